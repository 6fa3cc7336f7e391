// AVX-512 with BW, VL, VBMI2 (expand bytes and halves) and VNNI: Ice Lake, Zen 4 and later.
#include <immintrin.h>

#include "kernels.h"

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

}  // namespace

const Kernels kAvx512Kernels = kernels_of<Avx512>();
