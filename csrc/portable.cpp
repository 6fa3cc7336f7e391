// Plain C++: for processors without a unit of their own, and the slow but simple witness in the tests.
#include "kernels.h"
#include "symbols.h"
#include "symbols_plain.h"
#include "trellis.h"

namespace {

struct Portable {
    static constexpr int kLanes = 8;
    static constexpr uint64_t kLaneMask = 0xFF;
    static constexpr float kUnit = 1.0f;
    static constexpr int kExactRows = 1;
    static constexpr int64_t kQuickTokens = 4;

    struct Floats {
        float lane[kLanes];
    };
    using Bits = uint64_t;
    struct Bytes {
        int8_t lane[kWordBits];
    };
    using Signs = Bytes;

    static Floats broadcast(float value) {
        Floats out;
        for (float& lane : out.lane) lane = value;
        return out;
    }
    static Floats zero() { return broadcast(0.0f); }
    static Floats load(const float* from) {
        Floats out;
        memcpy(out.lane, from, sizeof out.lane);
        return out;
    }
    static float as_entry(int8_t value) { return value; }
    template <class Value>
    static float as_entry(Value value) {
        return to_float(value);
    }
    template <class Value>
    static Floats load(const Value* from) {
        Floats out;
        for (int i = 0; i < kLanes; ++i) out.lane[i] = as_entry(from[i]);
        return out;
    }
    template <class Out>
    static void save(const Floats& a, Out* to) {
        for (int i = 0; i < kLanes; ++i) from_float(a.lane[i], to + i);
    }
    static Floats add(const Floats& a, const Floats& b) {
        Floats out;
        for (int i = 0; i < kLanes; ++i) out.lane[i] = a.lane[i] + b.lane[i];
        return out;
    }
    static Floats mul(const Floats& a, const Floats& b) {
        Floats out;
        for (int i = 0; i < kLanes; ++i) out.lane[i] = a.lane[i] * b.lane[i];
        return out;
    }
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) { return add(mul(a, b), c); }
    static float total(const Floats& a) {
        float sum = 0.0f;
        for (float lane : a.lane) sum += lane;
        return sum;
    }
    static int64_t group(int64_t g) { return g; }

    static Bits bits(uint64_t word) { return word; }
    static Floats select(Bits bits, int64_t chunk, const Floats& off, const Floats& on) {
        Floats out;
        for (int i = 0; i < kLanes; ++i) out.lane[i] = bits >> (chunk * kLanes + i) & 1 ? on.lane[i] : off.lane[i];
        return out;
    }
    template <class Value>
    static Floats expand(const Value* values, uint64_t mask) {
        Floats out = zero();
        for (; mask != 0; mask &= mask - 1) out.lane[__builtin_ctzll(mask)] = as_entry(*values++);
        return out;
    }
    struct Word {
        uint64_t kept, minus;
    };
    static Word word(const uint64_t* planes, int64_t plane_count) {
        return {planes[0], plane_count == 2 ? planes[1] : 0};
    }
    static Bytes values8(const int8_t* values, const Word& word) {
        Bytes out = {};
        for (uint64_t kept = word.kept; kept != 0; kept &= kept - 1) out.lane[__builtin_ctzll(kept)] = *values++;
        return out;
    }
    static Signs signs8(const Word& word) {
        Signs out;
        for (int i = 0; i < kWordBits; ++i) {
            out.lane[i] = static_cast<int8_t>(word.kept >> i & 1 ? 0 : word.minus >> i & 1 ? -1 : 1);
        }
        return out;
    }
    static Floats dot(const Bytes& a, const int16_t* other) {
        int32_t sum = 0;
        for (int i = 0; i < kWordBits; ++i) sum += a.lane[i] * other[i];
        Floats out = zero();
        out.lane[0] = static_cast<float>(sum);
        return out;
    }
};

using PortableSymbols = PlainSymbols<Portable>;

}  // namespace

const Kernels kPortableKernels = kernels_of<Portable, PortableSymbols>();
const TrellisKernel kPortableTrellis = settle_rows;
