// AVX-512 with BW, VL, VBMI2 (expand bytes and halves) and VNNI: Ice Lake, Zen 4 and later.
#include <immintrin.h>

#include "kernels.h"
#include "symbols.h"
#include "trellis.h"

namespace {

struct Avx512 {
    static constexpr int kLanes = 16;
    static constexpr uint64_t kLaneMask = 0xFFFF;
    static constexpr float kUnit = 256.0f;
    static constexpr int kExactRows = 4;
    static constexpr int64_t kQuickTokens = 4;

    using Floats = __m512;
    using Bits = uint64_t;
    struct Bytes {
        __m512i low, high;  // 256 times the 8-bit values, in 16 bits
    };
    using Signs = Bytes;

    static Floats broadcast(float value) { return _mm512_set1_ps(value); }
    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static float total(Floats a) { return _mm512_reduce_add_ps(a); }
    static void save(Floats a, float* to) { _mm512_storeu_ps(to, a); }
    static void save(Floats a, BFloat* to) {
        const __m512i bits = _mm512_castps_si512(a);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }

    static Bits bits(uint64_t word) { return word; }
    static Floats select(Bits bits, int64_t chunk, Floats off, Floats on) {
        return _mm512_mask_blend_ps(static_cast<__mmask16>(bits >> (16 * chunk)), off, on);
    }

    // An expand that reads memory takes several times as long as one that reads a register (Zen 4 and 5): keep the
    // compiler from folding the load into it.
    template <class Vector>
    static Vector in_register(Vector value) {
        asm("" : "+v"(value));
        return value;
    }
    static __m256i expand_halves(const void* values, uint64_t mask) {
        const __m256i packed = in_register(_mm256_loadu_si256(static_cast<const __m256i*>(values)));
        return _mm256_maskz_expand_epi16(static_cast<__mmask16>(mask), packed);
    }
    static Floats expand(const Half* values, uint64_t mask) { return _mm512_cvtph_ps(expand_halves(values, mask)); }
    static Floats expand(const BFloat* values, uint64_t mask) {
        const __m512i wide = _mm512_cvtepu16_epi32(expand_halves(values, mask));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static Floats expand(const int8_t* values, uint64_t mask) {
        const __m128i packed = in_register(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
        const __m128i spread = _mm_maskz_expand_epi8(static_cast<__mmask16>(mask), packed);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(spread));
    }

    struct Word {
        uint64_t kept, minus;
    };
    static Word word(const uint64_t* planes, int64_t plane_count) {
        return {planes[0], plane_count == 2 ? planes[1] : 0};
    }
    // Bytes above a byte of zeros: 256 times the value, without a shuffle across the register. The low half gets the
    // columns of even groups of 8, the high half those of odd ones; x is stored in that order.
    static Bytes widen(__m512i bytes) {
        const __m512i zero = _mm512_setzero_si512();
        return {_mm512_unpacklo_epi8(zero, bytes), _mm512_unpackhi_epi8(zero, bytes)};
    }
    static int64_t group(int64_t g) { return g / 2 + g % 2 * 4; }

    static Bytes values8(const int8_t* values, Word word) {
        return widen(_mm512_maskz_expand_epi8(word.kept, in_register(_mm512_loadu_si512(values))));
    }
    static Signs signs8(Word word) {
        const __m512i others = _mm512_maskz_set1_epi8(~word.kept, 1);
        return widen(_mm512_mask_blend_epi8(word.minus, others, _mm512_set1_epi8(-1)));
    }
    static Floats dot(const Bytes& a, const int16_t* x) {
        const __m512i low = _mm512_dpwssd_epi32(_mm512_setzero_si512(), a.low, _mm512_loadu_si512(x));
        return _mm512_cvtepi32_ps(_mm512_dpwssd_epi32(low, a.high, _mm512_loadu_si512(x + 32)));
    }
};

// A table of 32 entries of 16 bits is one register, and its index the low 5 bits of a lane, whatever is above them.
struct Avx512Symbols : Avx512 {
    static constexpr float kBackgroundUnit = 1.0f;
    static constexpr bool kWholeTiles = true;
    static constexpr int quick_rows(int tokens) { return tokens == 4 ? 2 : 4; }
    static int64_t group(int64_t g) { return g; }

    struct Symbols {
        __m512i low, high, top;  // a byte in each lane of 16 bits
    };
    using Index = __m512i;
    struct Tables {
        __m512i level, background;
    };
    using Shorts = __m512i;
    using Sums = __m512i;
    struct Entries {
        __m512 low, high;
    };

    static __m512i wide(const uint8_t* bytes) {
        return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    }
    template <int P>
    static Symbols load(const uint8_t* low, const uint8_t* top) {
        Symbols out{};
        out.low = wide(low);
        if (P >= 4) out.high = wide(low + 32);
        if (P % 2 == 1) {
            // Bit 2 h of byte k is the sign of column 32 h + k, the next bit that of column 32 h + 16 + k. Moved up so that
            // sign h is bit P - 1 + 2 h: above its symbol, or with 5 bits and odd h two bits higher.
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(top));
            const __m512i both = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(bytes));
            constexpr int up = P - 1;
            out.top = _mm512_sllv_epi16(both, _mm512_inserti64x4(_mm512_set1_epi16(up), _mm256_set1_epi16(up - 1), 1));
        }
        return out;
    }
    // Signs are put above the other bits of their symbols before these are moved down.
    template <int P>
    static Index index(const Symbols& symbols, int64_t h) {
        const unsigned down = static_cast<unsigned>(P >= 4 ? h / 2 * 4 : 2 * h);
        __m512i bytes = P >= 4 && h % 2 == 1 ? symbols.high : symbols.low;
        if (P % 2 == 1) {
            const __m512i signs = P == 5 && h % 2 == 1 ? _mm512_srli_epi16(symbols.top, 2) : symbols.top;
            const __m512i place = _mm512_set1_epi16(static_cast<int16_t>(1 << (P - 1 + down)));
            bytes = _mm512_ternarylogic_epi32(place, signs, bytes, 0xCA);
        }
        return _mm512_srli_epi16(bytes, down);
    }
    static Tables tables(const int16_t* levels, const int16_t* backgrounds) {
        return {_mm512_loadu_si512(levels), _mm512_loadu_si512(backgrounds)};
    }
    template <int P>
    static Shorts levels(const Tables& tables, Index index) {
        return _mm512_permutexvar_epi16(index, tables.level);
    }
    template <int P>
    static Shorts backgrounds(const Tables& tables, Index index) {
        return _mm512_permutexvar_epi16(index, tables.background);
    }
    static Sums no_sums() { return _mm512_setzero_si512(); }
    static Sums dot(Sums sums, Shorts a, const int16_t* x) {
        return _mm512_dpwssd_epi32(sums, a, _mm512_loadu_si512(x));
    }
    static Floats to_floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }
    // Four vectors together: in each 128 bits of a sum, lane i then belongs to vector i.
    template <int N>
    static void totals(const Floats (&a)[N], float (&out)[N]) {
        static_assert(N % 4 == 0);
        UNROLLED for (int i = 0; i < N; i += 4) {
            const Floats even = add(_mm512_unpacklo_ps(a[i], a[i + 2]), _mm512_unpackhi_ps(a[i], a[i + 2]));
            const Floats odd = add(_mm512_unpacklo_ps(a[i + 1], a[i + 3]), _mm512_unpackhi_ps(a[i + 1], a[i + 3]));
            const Floats four = add(_mm512_unpacklo_ps(even, odd), _mm512_unpackhi_ps(even, odd));
            const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
            _mm_storeu_ps(out + i, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
        }
    }

    static Floats scaled(const float* levels, const float* backgrounds, float s, float u) {
        return add(mul(load(levels), broadcast(s)), mul(load(backgrounds), broadcast(u)));
    }
    static Entries entries(const float* levels, const float* backgrounds, float s, float u) {
        return {scaled(levels, backgrounds, s, u), scaled(levels + 16, backgrounds + 16, s, u)};
    }
    template <int P>
    static Floats entry(const Entries& table, Index index, int64_t i, Floats right) {
        const __m256i half = i == 0 ? _mm512_castsi512_si256(index) : _mm512_extracti64x4_epi64(index, 1);
        const __m512i at = _mm512_cvtepu16_epi32(half);
        const Floats out = _mm512_permutex2var_ps(table.low, at, table.high);
        return _mm512_mask_mul_ps(out, _mm512_testn_epi32_mask(at, _mm512_set1_epi32((1 << (P - 1)) - 1)), out, right);
    }
    static Floats swap(Floats a, int s) {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_permutexvar_ps(_mm512_xor_si512(lanes, _mm512_set1_epi32(s)), a);
    }
    using Avx512::load;
};

}  // namespace

const Kernels kAvx512Kernels = kernels_of<Avx512, Avx512Symbols>();
const TrellisKernel kAvx512Trellis = settle_rows;
