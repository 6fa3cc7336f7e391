// NEON of every 64-bit ARM: 16-bit values are spread by table look-ups, int8 values by the same table in halves.
#include <arm_neon.h>

#include "kernels.h"
#include "symbols.h"
#include "symbols_plain.h"
#include "tables.h"
#include "trellis.h"

namespace {

struct Neon {
    static constexpr int kLanes = 8;
    static constexpr uint64_t kLaneMask = 0xFF;
    static constexpr float kUnit = 1.0f;
    static constexpr int kExactRows = 2;
    static constexpr int64_t kQuickTokens = 2;

    struct Floats {
        float32x4_t low, high;
    };
    using Bits = uint64_t;
    struct Bytes {
        int8x16_t value[4];
    };
    using Signs = Bytes;

    static Floats broadcast(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
    static Floats zero() { return broadcast(0.0f); }
    static Floats load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
    static Floats add(Floats a, Floats b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
    static Floats mul(Floats a, Floats b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
    static Floats fma(Floats a, Floats b, Floats c) {
        return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
    }
    static float total(Floats a) { return vaddvq_f32(vaddq_f32(a.low, a.high)); }
    static void save(Floats a, float* to) {
        vst1q_f32(to, a.low);
        vst1q_f32(to + 4, a.high);
    }
    static uint16x4_t rounded(float32x4_t a) {
        const uint32x4_t bits = vreinterpretq_u32_f32(a);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        return vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF))), 16);
    }
    static void save(Floats a, BFloat* to) {
        vst1q_u16(reinterpret_cast<uint16_t*>(to), vcombine_u16(rounded(a.low), rounded(a.high)));
    }

    static int64_t group(int64_t g) { return g; }

    static Bits bits(uint64_t word) { return word; }
    static Floats select(Bits bits, int64_t chunk, Floats off, Floats on) {
        static const uint32_t bit_of[8] = {1, 2, 4, 8, 16, 32, 64, 128};
        const uint32x4_t mask = vdupq_n_u32(static_cast<uint32_t>(bits >> (8 * chunk) & 0xFF));
        return {vbslq_f32(vtstq_u32(mask, vld1q_u32(bit_of)), on.low, off.low),
                vbslq_f32(vtstq_u32(mask, vld1q_u32(bit_of + 4)), on.high, off.high)};
    }

    static uint16x8_t spread_halves(const void* values, uint64_t mask) {
        const uint8x16_t packed = vld1q_u8(static_cast<const uint8_t*>(values));
        return vreinterpretq_u16_u8(vqtbl1q_u8(packed, vld1q_u8(kSpread.halves[mask])));
    }
    static Floats widened(const Half*, uint16x8_t bits) {
        const float16x8_t halves = vreinterpretq_f16_u16(bits);
        return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_f32_f16(vget_high_f16(halves))};
    }
    static Floats widened(const BFloat*, uint16x8_t halves) {
        return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16)),
                vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(halves), 16))};
    }
    template <class Value>
    static Floats expand(const Value* values, uint64_t mask) {
        return widened(values, spread_halves(values, mask));
    }
    template <class Value>
    static Floats load(const Value* from) {
        return widened(from, vld1q_u16(reinterpret_cast<const uint16_t*>(from)));
    }
    static Floats widened(int8x8_t bytes) {
        const int16x8_t wide = vmovl_s8(bytes);
        return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
    }
    static Floats load(const int8_t* from) { return widened(vld1_s8(from)); }
    static int8x8_t spread_bytes(const int8_t* values, uint64_t mask) {
        return vtbl1_s8(vld1_s8(values), vld1_s8(reinterpret_cast<const int8_t*>(kSpread.bytes[mask])));
    }
    static Floats expand(const int8_t* values, uint64_t mask) { return widened(spread_bytes(values, mask)); }

    struct Word {
        uint64_t kept, minus;
    };
    static Word word(const uint64_t* planes, int64_t plane_count) {
        return {planes[0], plane_count == 2 ? planes[1] : 0};
    }
    static Bytes values8(const int8_t* values, Word word) {
        uint64_t kept = word.kept;
        Bytes out;
        for (int i = 0; i < 4; ++i, kept >>= 16) {
            const int8x8_t first = spread_bytes(values, kept & 0xFF);
            values += __builtin_popcountll(kept & 0xFF);
            out.value[i] = vcombine_s8(first, spread_bytes(values, kept >> 8 & 0xFF));
            values += __builtin_popcountll(kept >> 8 & 0xFF);
        }
        return out;
    }
    // Bits of a mask as bytes of all ones.
    static uint8x16_t byte_mask(uint64_t bits) {
        const uint8x8_t bit_of = vcreate_u8(0x8040201008040201ull);
        const uint8x8_t low = vdup_n_u8(static_cast<uint8_t>(bits)), high = vdup_n_u8(static_cast<uint8_t>(bits >> 8));
        return vtstq_u8(vcombine_u8(low, high), vcombine_u8(bit_of, bit_of));
    }
    static Signs signs8(Word word) {
        Signs out;
        for (int i = 0; i < 4; ++i, word.kept >>= 16, word.minus >>= 16) {
            const uint8x16_t others = vbicq_u8(vdupq_n_u8(1), byte_mask(word.kept));
            out.value[i] = vreinterpretq_s8_u8(vorrq_u8(others, byte_mask(word.minus)));
        }
        return out;
    }
    static Floats dot(const Bytes& a, const int16_t* x) {
        int32x4_t low = vdupq_n_s32(0), high = vdupq_n_s32(0);
        for (int i = 0; i < 4; ++i, x += 16) {
            const int16x8_t first = vmovl_s8(vget_low_s8(a.value[i])), second = vmovl_s8(vget_high_s8(a.value[i]));
            const int16x8_t x_first = vld1q_s16(x), x_second = vld1q_s16(x + 8);
            low = vmlal_s16(low, vget_low_s16(first), vget_low_s16(x_first));
            high = vmlal_s16(high, vget_high_s16(first), vget_high_s16(x_first));
            low = vmlal_s16(low, vget_low_s16(second), vget_low_s16(x_second));
            high = vmlal_s16(high, vget_high_s16(second), vget_high_s16(x_second));
        }
        return {vcvtq_f32_s32(low), vcvtq_f32_s32(high)};
    }
};

// Bytes are looked up in tables of 32 and 64.
struct NeonSymbols : PlainSymbols<Neon> {
    static constexpr int64_t kChunk = 16;
    static constexpr int quick_rows(int tokens) { return 4 / tokens; }

    struct Symbols {
        const uint8_t *low, *top;
    };
    using Index = uint8x16_t;
    using Table = uint8x16x4_t;
    using Bytes = uint8x16_t;
    struct Sums {
        int32x4_t low, high;
    };

    using Neon::load;
    template <int P>
    static Symbols load(const uint8_t* low, const uint8_t* top) {
        return {low, top};
    }
    template <int P>
    static Index index(const Symbols& symbols, int64_t h) {
        const uint8x16_t symbol = fields<low_bits(P)>(symbols.low, h);
        if constexpr (top_bits(P) == 0) return symbol;
        else return vorrq_u8(symbol, vshlq_n_u8(fields<top_bits(P)>(symbols.top, h), low_bits(P)));
    }
    // Of a plane of Q bits.
    template <int Q>
    static uint8x16_t fields(const uint8_t* plane, int64_t h) {
        constexpr int64_t kParts = kTileColumns * Q / 8 / kChunk;
        const int8x16_t down = vdupq_n_s8(static_cast<int8_t>(-Q * (h / kParts)));
        return vandq_u8(vshlq_u8(vld1q_u8(plane + h % kParts * kChunk), down), vdupq_n_u8((1 << Q) - 1));
    }
    template <int P>
    static Table table(const Levels& levels) {
        return {{vld1q_u8(levels.byte), vld1q_u8(levels.byte + 16), vld1q_u8(levels.byte + 32), vld1q_u8(levels.byte + 48)}};
    }
    // Where the symbol above is odd, all bits turn.
    template <int P>
    static Bytes look_up(const Table& table, Index above, Index own) {
        const uint8x16_t odd = vtstq_u8(above, vdupq_n_u8(1));
        if (P < 6) return veorq_u8(vqtbl2q_u8({{table.val[0], table.val[1]}}, own), odd);
        return veorq_u8(vqtbl4q_u8(table, own), odd);
    }
    static Floats floats(Bytes bytes, int64_t i) {
        const uint16x8_t wide = vmovl_u8(i == 0 ? vget_low_u8(bytes) : vget_high_u8(bytes));
        return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(wide)))};
    }

    static void arrange(const int16_t* fixed, int16_t* out) {
        for (int64_t k = 0; k < kChunk; ++k) out[k] = static_cast<int16_t>(2 * fixed[k]);
    }
    static Bytes all(uint8_t byte) { return vdupq_n_u8(byte); }
    static Sums start(const int32_t* starts) { return {vld1q_s32(starts), vld1q_s32(starts + 4)}; }
    static Sums dot(Sums sums, Bytes a, const int16_t* x) {
        for (int i = 0; i < 2; ++i) {
            const int16x8_t u = vreinterpretq_s16_u16(vmovl_u8(i == 0 ? vget_low_u8(a) : vget_high_u8(a)));
            const int16x8_t from = vld1q_s16(x + 8 * i);
            sums.low = vmlal_s16(sums.low, vget_low_s16(u), vget_low_s16(from));
            sums.high = vmlal_s16(sums.high, vget_high_s16(u), vget_high_s16(from));
        }
        return sums;
    }
    using Neon::save;
    static void save(const Sums& sums, int32_t* to) {
        vst1q_s32(to, sums.low);
        vst1q_s32(to + 4, sums.high);
    }
    static Floats to_floats(const Sums& sums) { return {vcvtq_f32_s32(sums.low), vcvtq_f32_s32(sums.high)}; }
};

}  // namespace

const Kernels kNeonKernels = kernels_of<Neon, NeonSymbols>();
const TrellisKernel kNeonTrellis = settle_rows;
