// The primitives for symbols in plain C++ (see symbols.h): slow, but every compiler has them.
#pragma once

#include "tiles.h"

namespace {

// Over the floats of an instruction set that has nothing better.
template <class Base>
struct PlainSymbols : Base {
    using Floats = typename Base::Floats;
    using Base::load;
    using Base::save;
    static_assert(Base::kLanes == 8);
    static constexpr int64_t kChunk = 32;
    static constexpr int kBatchTokens = 0;
    static constexpr int quick_rows(int) { return 1; }

    struct Symbols {
        const uint8_t *low, *top;
    };
    struct Bytes {
        uint8_t lane[kChunk];
    };
    using Index = Bytes;
    using Table = Levels;
    struct Sums {
        int32_t lane[8];
    };

    template <int P>
    static Symbols load(const uint8_t* low, const uint8_t* top) {
        return {low, top};
    }
    template <int P>
    static Index index(const Symbols& symbols, int64_t h) {
        constexpr int Q = low_bits(P), T = top_bits(P);
        Index out;
        for (int64_t k = 0; k < kChunk; ++k) {
            const int64_t column = h * kChunk + k;
            unsigned symbol = symbols.low[column % low_stride(P)] >> (column / low_stride(P) * Q) & ((1u << Q) - 1);
            if constexpr (T > 0) {
                symbol |= (symbols.top[column % top_stride(P)] >> (column / top_stride(P) * T) & ((1u << T) - 1)) << Q;
            }
            out.lane[k] = static_cast<uint8_t>(symbol);
        }
        return out;
    }
    template <int P>
    static Table table(const Levels& levels) {
        return levels;
    }
    template <int P>
    static Bytes look_up(const Table& table, const Index& above, const Index& own) {
        Bytes out;
        for (int64_t k = 0; k < kChunk; ++k) {
            const int flip = above.lane[k] % 2 == 1 ? 255 : 0;
            out.lane[k] = static_cast<uint8_t>(table.byte[own.lane[k]] ^ flip);
        }
        return out;
    }
    static Floats floats(const Bytes& bytes, int64_t i) {
        float out[8];
        for (int64_t k = 0; k < 8; ++k) out[k] = bytes.lane[8 * i + k];
        return Base::load(out);
    }
    static void arrange(const int16_t* fixed, int16_t* out) {
        for (int64_t k = 0; k < kChunk; ++k) out[k] = static_cast<int16_t>(2 * fixed[k]);
    }
    static Bytes all(uint8_t byte) {
        Bytes out;
        memset(out.lane, byte, sizeof out.lane);
        return out;
    }
    static Sums start(const int32_t* starts) {
        Sums out;
        memcpy(out.lane, starts, sizeof out.lane);
        return out;
    }
    static Sums dot(Sums sums, const Bytes& a, const int16_t* x) {
        for (int64_t k = 0; k < kChunk; ++k) sums.lane[k % 8] += a.lane[k] * x[k];
        return sums;
    }
    static void save(const Sums& sums, int32_t* to) { memcpy(to, sums.lane, sizeof sums.lane); }
    static Floats to_floats(const Sums& sums) {
        float out[8];
        for (int i = 0; i < 8; ++i) out[i] = static_cast<float>(sums.lane[i]);
        return Base::load(out);
    }
    template <int N>
    static void totals(const Floats (&a)[N], float (&out)[N]) {
        for (int i = 0; i < N; ++i) out[i] = Base::total(a[i]);
    }
    static Floats swap(Floats a, int s) {
        float in[Base::kLanes], out[Base::kLanes];
        Base::save(a, in);
        for (int i = 0; i < Base::kLanes; ++i) out[i] = in[i ^ s];
        return Base::load(out);
    }
};

}  // namespace
