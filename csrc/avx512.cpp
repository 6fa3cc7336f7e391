// AVX-512 with BW, VL, VBMI (shuffles of bytes), VBMI2 (expand bytes and halves), VNNI and GFNI (matrices of bits): Ice
// Lake, Zen 4 and later.
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
    static Floats widened(const Half*, __m256i halves) { return _mm512_cvtph_ps(halves); }
    static Floats widened(const BFloat*, __m256i halves) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    template <class Value>
    static Floats expand(const Value* values, uint64_t mask) {
        return widened(values, expand_halves(values, mask));
    }
    template <class Value>
    static Floats load(const Value* from) {
        return widened(from, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static Floats load(const int8_t* from) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
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

// For vgf2p8affineqb, a matrix for each 8 bytes of a register: row 7 - i says which bits make bit i.
struct Matrices {
    alignas(64) uint8_t rows[8][8];
};

// Bit i of a byte becomes its bit source(part, i), where the byte is in the given eighth of the register.
template <class Source>
constexpr Matrices moving(Source source) {
    Matrices out = {};
    for (int part = 0; part < 8; ++part) {
        for (int i = 0; i < 8; ++i) out.rows[part][7 - i] = static_cast<uint8_t>(1 << source(part, i));
    }
    return out;
}

// For the first 64 columns of a tile and the others. Of a plane of 2 bits, the field comes to bits 0, 2, 4 and 6; of a plane
// of 1 bit, the bit to all of them.
constexpr Matrices kTwoBits[2] = {moving([](int part, int i) { return part / 4 * 2 + i % 2; }),
                                  moving([](int part, int i) { return part / 4 * 2 + i % 2 + 4; })};
constexpr Matrices kOneBit[2] = {moving([](int part, int) { return part / 2; }),
                                 moving([](int part, int) { return part / 2 + 4; })};
// Of a plane of 2 bits, to bits 5 and 6.
constexpr Matrices kTopTwoBits[2] = {moving([](int part, int i) { return part / 4 * 2 + (i + 1) % 2; }),
                                     moving([](int part, int i) { return part / 4 * 2 + (i + 1) % 2 + 4; })};
constexpr Matrices kHalvesSwapped = moving([](int, int i) { return (i + 4) % 8; });

// A table of 64 bytes is one register, one of 128 two, and its index the low bits of a byte, whatever is above them. With Q
// bits of a symbol in the low plane these are, from the lowest on: they, whether the symbol above is odd, and those of the
// top plane.
struct Avx512Symbols : Avx512 {
    static constexpr int64_t kChunk = 64;
    static constexpr int kBatchTokens = 12;
    static constexpr int quick_rows(int tokens) { return tokens == 4 ? 2 : 4; }

    struct Symbols {
        __m512i low, top;
    };
    struct Index {
        __m512i symbol;  // all bits of an index but bit Q
        __m512i odd;     // bit Q of the index of the row below
    };
    struct Table {
        __m512i low, high;
    };
    using Bytes = __m512i;
    struct Sums {
        __m512i high, low;  // of products with the high 8 bits of inputs, and with the low 7
    };

    // Of narrow planes each part of the register has all columns: which of them it is for, the matrices say.
    template <int P>
    static Symbols load(const uint8_t* low, const uint8_t* top) {
        Symbols out{};
        if (P >= 4) out.low = _mm512_loadu_si512(low);
        if (P < 4) out.low = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
        if (top_bits(P) == 1) out.top = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(top)));
        if (top_bits(P) == 2) out.top = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(top)));
        return out;
    }
    static __m512i multiply(__m512i bytes, const Matrices& by) {
        return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_load_si512(by.rows), 0);
    }
    template <int P>
    static Index index(const Symbols& symbols, int64_t h) {
        Index out{};
        if (P < 4) {
            out.symbol = out.odd = multiply(symbols.low, kTwoBits[h]);
        } else {
            // Where one half of a byte is at bit 0, the lowest bit of the other one is at bit 4.
            const __m512i swapped = multiply(symbols.low, kHalvesSwapped);
            out.symbol = h == 0 ? symbols.low : swapped;
            out.odd = h == 0 ? swapped : symbols.low;
        }
        if (top_bits(P) == 0) return out;
        const __m512i top = multiply(symbols.top, (top_bits(P) == 1 ? kOneBit : kTopTwoBits)[h]);
        out.symbol = select((1 << low_bits(P)) - 1, out.symbol, top);
        return out;
    }
    using Avx512::select;
    // Bits of `on` where the mask of each byte has one, else those of `off`.
    static __m512i select(int mask, __m512i on, __m512i off) {
        return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(mask)), on, off, 0xCA);
    }
    template <int P>
    static Table table(const Levels& levels) {
        constexpr int Q = low_bits(P);
        uint8_t bytes[128];
        for (int k = 0; k < 128; ++k) {
            const int symbol = k % (1 << Q) | k >> (Q + 1) << Q;
            const uint8_t u = levels.byte[symbol % (1 << P)];
            bytes[k] = k >> Q & 1 ? static_cast<uint8_t>(255 - u) : u;
        }
        return {_mm512_loadu_si512(bytes), _mm512_loadu_si512(bytes + 64)};
    }
    template <int P>
    static Bytes look_up(const Table& table, const Index& above, const Index& own) {
        const __m512i index = select(0xFF ^ 1 << low_bits(P), own.symbol, above.odd);
        if (P < 6) return _mm512_permutexvar_epi8(index, table.low);
        return _mm512_permutex2var_epi8(table.low, index, table.high);
    }
    static Floats floats(Bytes bytes, int64_t i) {
        const __m256i half = i < 2 ? _mm512_castsi512_si256(bytes) : _mm512_extracti64x4_epi64(bytes, 1);
        const __m128i part = i % 2 == 0 ? _mm256_castsi256_si128(half) : _mm256_extracti128_si256(half, 1);
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(part));
    }

    // An input is 128 times a signed byte plus 7 bits. Four products of bytes are summed at once.
    static void arrange(const int16_t* fixed, int16_t* out) {
        int8_t* bytes = reinterpret_cast<int8_t*>(out);
        for (int64_t k = 0; k < kChunk; ++k) {
            bytes[k] = static_cast<int8_t>(fixed[k] >> 6);
            bytes[kChunk + k] = static_cast<int8_t>(2 * (fixed[k] & 63));
        }
    }
    static Bytes bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static Bytes all(uint8_t byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
    static Sums start(const int32_t* starts) { return {_mm512_setzero_si512(), _mm512_loadu_si512(starts)}; }
    static Sums dot(const Sums& sums, Bytes a, const int16_t* x) {
        return {_mm512_dpbusd_epi32(sums.high, a, _mm512_loadu_si512(x)),
                _mm512_dpbusd_epi32(sums.low, a, _mm512_loadu_si512(x + 32))};
    }
    template <int Planes>
    static void arrange(const int16_t* fixed, int8_t* out) {
        if (Planes == 2) return arrange(fixed, reinterpret_cast<int16_t*>(out));
        for (int64_t k = 0; k < kChunk; ++k) out[k] = static_cast<int8_t>(fixed[k]);
    }
    using Words = __m512i;
    static Words words(int32_t value) { return _mm512_set1_epi32(value); }
    static Words four(const int8_t* x) {
        int32_t bytes;
        memcpy(&bytes, x, sizeof bytes);
        return _mm512_set1_epi32(bytes);
    }
    // GCC 12 moves accumulators from register to register around the intrinsic, and some of them to memory.
    static void add_products(Words& sum, Bytes a, Words x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(x)); }
    template <int Planes>
    static Floats whole(Words high, Words low) {
        return _mm512_cvtepi32_ps(Planes == 2 ? whole({high, low}) : low);
    }
    // 16 vectors of 16 words: vector i gets word i of each.
    static void save_transposed(const Bytes (&rows)[16], uint8_t* to, int64_t stride) {
        __m512i pairs[16], fours[16];
        UNROLLED for (int i = 0; i < 16; i += 2) {
            pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        UNROLLED for (int i = 0; i < 16; i += 4) {
            fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
            fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
            fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
            fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
        }
        UNROLLED for (int j = 0; j < 4; ++j) {  // of four words in 128 bits, word j; first those of even parts, then of odd ones
            const __m512i even = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88), odd = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xDD);
            const __m512i more_even = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
            const __m512i more_odd = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xDD);
            _mm512_storeu_si512(to + j * stride, _mm512_shuffle_i32x4(even, more_even, 0x88));
            _mm512_storeu_si512(to + (4 + j) * stride, _mm512_shuffle_i32x4(odd, more_odd, 0x88));
            _mm512_storeu_si512(to + (8 + j) * stride, _mm512_shuffle_i32x4(even, more_even, 0xDD));
            _mm512_storeu_si512(to + (12 + j) * stride, _mm512_shuffle_i32x4(odd, more_odd, 0xDD));
        }
    }
    static __m512i whole(const Sums& sums) { return _mm512_add_epi32(_mm512_slli_epi32(sums.high, 7), sums.low); }
    static void save(const Sums& sums, int32_t* to) { _mm512_storeu_si512(to, whole(sums)); }
    static Floats to_floats(const Sums& sums) { return _mm512_cvtepi32_ps(whole(sums)); }
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
    static Floats swap(Floats a, int s) {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_permutexvar_ps(_mm512_xor_si512(lanes, _mm512_set1_epi32(s)), a);
    }
    using Avx512::load;
    using Avx512::save;
};

}  // namespace

const Kernels kAvx512Kernels = kernels_of<Avx512, Avx512Symbols>();
const TrellisKernel kAvx512Trellis = settle_rows;
