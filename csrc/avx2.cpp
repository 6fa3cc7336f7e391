// AVX2 + FMA + F16C. There is no expand instruction, so values are spread over their columns by byte shuffles: from a
// table for eight 16-bit values, by prefix sums in a register for 32 int8 values at once.
#include <immintrin.h>

#include "kernels.h"
#include "symbols.h"
#include "tables.h"
#include "trellis.h"

namespace {

struct Avx2 {
    static constexpr int kLanes = 8;
    static constexpr uint64_t kLaneMask = 0xFF;
    static constexpr float kUnit = 256.0f;
    static constexpr int kExactRows = 2;
    static constexpr int64_t kQuickTokens = 1;

    using Floats = __m256;
    struct Bits {
        __m256i low, high;  // each half of the word in all lanes
    };
    struct Bytes {
        __m256i part[4];  // 256 times the 8-bit values, in 16 bits
    };
    using Signs = Bytes;

    static Floats broadcast(float value) { return _mm256_set1_ps(value); }
    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats load(const float* from) { return _mm256_loadu_ps(from); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static void save(Floats a, float* to) { _mm256_storeu_ps(to, a); }
    static void save(Floats a, BFloat* to) {
        const __m256i bits = _mm256_castps_si256(a);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        const __m256i top = _mm256_srli_epi32(rounded, 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
    }
    static float total(Floats a) {
        __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
        return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
    }

    static Bits bits(uint64_t word) {
        return {_mm256_set1_epi32(static_cast<int>(word)), _mm256_set1_epi32(static_cast<int>(word >> 32))};
    }
    // blendv looks at the top bit of each lane: shift the lane's bit there.
    static Floats select(const Bits& bits, int64_t chunk, Floats off, Floats on) {
        const int top = 31 - 8 * static_cast<int>(chunk % 4);
        const __m256i shifts = _mm256_sub_epi32(_mm256_set1_epi32(top), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        const __m256i mask = _mm256_sllv_epi32(chunk < 4 ? bits.low : bits.high, shifts);
        return _mm256_blendv_ps(off, on, _mm256_castsi256_ps(mask));
    }

    static __m128i spread_halves(const void* values, uint64_t mask) {
        const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(kSpread.halves[mask]));
        return _mm_shuffle_epi8(_mm_loadu_si128(static_cast<const __m128i*>(values)), shuffle);
    }
    static Floats widened(const Half*, __m128i halves) { return _mm256_cvtph_ps(halves); }
    static Floats widened(const BFloat*, __m128i halves) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    template <class Value>
    static Floats expand(const Value* values, uint64_t mask) {
        return widened(values, spread_halves(values, mask));
    }
    template <class Value>
    static Floats load(const Value* from) {
        return widened(from, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static Floats load(const int8_t* from) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    }
    static Floats expand(const int8_t* values, uint64_t mask) {
        const __m128i shuffle = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpread.bytes[mask]));
        const __m128i bytes = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)), shuffle);
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }

    // Kept and minus bits side by side in both halves of the register: one load serves four spreads.
    struct Word {
        uint64_t kept;
        __m256i bits;
    };
    static Word word(const uint64_t* planes, int64_t plane_count) {
        const __m128i* from = reinterpret_cast<const __m128i*>(planes);
        return {planes[0], _mm256_broadcastsi128_si256(plane_count == 2 ? _mm_loadu_si128(from) : _mm_loadl_epi64(from))};
    }

    // 32 columns from bit 8 * byte on: byte i of the result has only bit i % 8 of byte i / 8.
    static __m256i spread_bits(__m256i bits, int byte) {
        const __m256i byte_of = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                                 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
        const __m256i shuffle = _mm256_add_epi8(byte_of, _mm256_set1_epi8(static_cast<char>(byte)));
        return _mm256_and_si256(_mm256_shuffle_epi8(bits, shuffle), bit_of());
    }
    static __m256i bit_of() { return _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull)); }
    static __m256i kept_flags(const Word& word, int half) {
        return _mm256_min_epu8(spread_bits(word.bits, 4 * half), _mm256_set1_epi8(1));
    }

    // The k-th kept lane of each 16 takes the k-th of its values: inclusive prefix sums of the flags, minus 1.
    static __m256i values32(const int8_t* values, uint32_t kept, __m256i flags) {
        constexpr int64_t none = -1, third = 0x0303030380808080ll, eleventh = 0x0B0B0B0B80808080ll;
        const __m256i top_of_four = _mm256_setr_epi64x(third, eleventh, third, eleventh);
        const __m256i top_of_eight = _mm256_setr_epi64x(none, 0x0707070707070707ll, none, 0x0707070707070707ll);
        __m256i rank = _mm256_mullo_epi32(flags, _mm256_set1_epi32(0x01010101));
        rank = _mm256_add_epi8(rank, _mm256_shuffle_epi8(rank, top_of_four));
        rank = _mm256_add_epi8(rank, _mm256_shuffle_epi8(rank, top_of_eight));
        rank = _mm256_sub_epi8(rank, _mm256_set1_epi8(1));
        const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        const int skip = __builtin_popcount(kept & 0xFFFFu);
        const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + skip));
        const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
        return _mm256_sign_epi8(_mm256_shuffle_epi8(both, rank), flags);  // flag 0 gives 0
    }

    // Bytes above a byte of zeros: 256 times the value, without a shuffle across the register. Of every four groups of
    // 8 columns the even ones come first, then the odd ones; x is stored in that order.
    static Bytes widen(__m256i first, __m256i second) {
        const __m256i zero = _mm256_setzero_si256();
        return {{_mm256_unpacklo_epi8(zero, first), _mm256_unpackhi_epi8(zero, first),
                 _mm256_unpacklo_epi8(zero, second), _mm256_unpackhi_epi8(zero, second)}};
    }
    static int64_t group(int64_t g) { return g / 4 * 4 + g % 4 / 2 + g % 2 * 2; }

    static Bytes values8(const int8_t* values, const Word& word) {
        const uint32_t low = static_cast<uint32_t>(word.kept), high = static_cast<uint32_t>(word.kept >> 32);
        return widen(values32(values, low, kept_flags(word, 0)),
                     values32(values + __builtin_popcount(low), high, kept_flags(word, 1)));
    }
    static Signs signs8(const Word& word) { return widen(signs32(word, 0), signs32(word, 1)); }
    static __m256i signs32(const Word& word, int half) {
        const __m256i others = _mm256_xor_si256(kept_flags(word, half), _mm256_set1_epi8(1));
        return _mm256_or_si256(others, _mm256_cmpeq_epi8(spread_bits(word.bits, 8 + 4 * half), bit_of()));
    }

    static Floats dot(const Bytes& a, const int16_t* x) {
        const __m256i* from = reinterpret_cast<const __m256i*>(x);
        __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int i = 0; i < 4; ++i) {
            sum[i % 2] = _mm256_add_epi32(sum[i % 2], _mm256_madd_epi16(a.part[i], _mm256_loadu_si256(from + i)));
        }
        return _mm256_cvtepi32_ps(_mm256_add_epi32(sum[0], sum[1]));
    }
};

// Tables of 16 bytes; the bits of the top plane choose between two or four of them.
struct Avx2Symbols : Avx2 {
    static constexpr int64_t kQuickTokens = 4;
    static constexpr int64_t kChunk = 32;
    static constexpr int kBatchTokens = 0;
    static constexpr int quick_rows(int tokens) { return tokens == 4 ? 2 : 4; }

    struct Symbols {
        __m256i low, high, top;
    };
    struct Index {
        __m256i bytes;  // below 16
        __m256i top[2];  // all ones where a bit of the top plane is set
    };
    struct Table {
        __m256i part[4];
    };
    using Bytes = __m256i;
    using Sums = __m256i;

    static __m256i twice(const void* from) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from)));
    }
    template <int P>
    static Symbols load(const uint8_t* low, const uint8_t* top) {
        const __m256i* from = reinterpret_cast<const __m256i*>(low);
        Symbols out{};
        out.low = _mm256_loadu_si256(from);
        if (P >= 4) out.high = _mm256_loadu_si256(from + 1);
        if (top_bits(P) == 1) out.top = twice(top);
        if (top_bits(P) == 2) out.top = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(top));
        return out;
    }
    template <int P>
    static Index index(const Symbols& symbols, int64_t h) {
        const __m256i bytes = P >= 4 && h % 2 == 1 ? symbols.high : symbols.low;
        const int shift = static_cast<int>(P >= 4 ? h / 2 * 4 : 2 * h);
        Index out{};
        out.bytes = _mm256_and_si256(_mm256_srli_epi16(bytes, shift), _mm256_set1_epi8((1 << low_bits(P)) - 1));
        const __m128i bit = _mm_set1_epi8(static_cast<char>(1u << (2 * h))), next = _mm_add_epi8(bit, bit);
        if (top_bits(P) == 1) {
            // Both halves of the register hold bytes 0 to 15: bit 2 h of them is of the first 16 columns, the next of the others.
            out.top[0] = where_set(symbols.top, _mm256_set_m128i(next, bit));
        } else if (top_bits(P) == 2) {
            out.top[0] = where_set(symbols.top, _mm256_set_m128i(bit, bit));
            out.top[1] = where_set(symbols.top, _mm256_set_m128i(next, next));
        }
        if (P == 3) out.bytes = _mm256_or_si256(out.bytes, _mm256_and_si256(out.top[0], _mm256_set1_epi8(4)));
        return out;
    }
    static __m256i where_set(__m256i bytes, __m256i bit) { return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit); }
    template <int P>
    static Table table(const Levels& levels) {
        return {{twice(levels.byte), twice(levels.byte + 16), twice(levels.byte + 32), twice(levels.byte + 48)}};
    }
    // With the lowest bit of the top plane.
    template <int P>
    static __m256i of_pair(const __m256i* part, const Index& own) {
        const __m256i u = _mm256_shuffle_epi8(part[0], own.bytes);
        return P < 5 ? u : _mm256_blendv_epi8(u, _mm256_shuffle_epi8(part[1], own.bytes), own.top[0]);
    }
    template <int P>
    static Bytes look_up(const Table& table, const Index& above, const Index& own) {
        __m256i u = of_pair<P>(table.part, own);
        if (P == 6) u = _mm256_blendv_epi8(u, of_pair<P>(table.part + 2, own), own.top[1]);
        // Where the symbol above is odd, all bits turn.
        const __m256i odd = _mm256_set1_epi16(static_cast<int16_t>(0xFF00));
        return _mm256_xor_si256(u, _mm256_shuffle_epi8(odd, above.bytes));
    }
    // Bytes 8 i ... of 32, in the lower half of the result.
    static __m128i eight(__m256i bytes, int64_t i) {
        const __m128i half = i < 2 ? _mm256_castsi256_si128(bytes) : _mm256_extracti128_si256(bytes, 1);
        return i % 2 == 0 ? half : _mm_srli_si128(half, 8);
    }
    static Floats floats(Bytes bytes, int64_t i) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(bytes, i)));
    }

    // Lanes of 16 bits hold two columns. The even ones come first, then the odd ones.
    static void arrange(const int16_t* fixed, int16_t* out) {
        for (int64_t k = 0; k < kChunk; ++k) out[k % 2 * 16 + k / 2] = static_cast<int16_t>(2 * fixed[k]);
    }
    static Bytes all(uint8_t byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
    static Sums start(const int32_t* starts) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(starts)); }
    static Sums dot(Sums sums, Bytes a, const int16_t* x) {
        const __m256i* from = reinterpret_cast<const __m256i*>(x);
        const __m256i even = _mm256_and_si256(a, _mm256_set1_epi16(0xFF)), odd = _mm256_srli_epi16(a, 8);
        const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_loadu_si256(from)),
                                                  _mm256_madd_epi16(odd, _mm256_loadu_si256(from + 1)));
        return _mm256_add_epi32(sums, products);
    }
    static void save(Sums sums, int32_t* to) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sums); }
    static Floats to_floats(Sums sums) { return _mm256_cvtepi32_ps(sums); }
    // Two vectors together: in each 128 bits of a sum, even lanes belong to the first.
    template <int N>
    static void totals(const Floats (&a)[N], float (&out)[N]) {
        static_assert(N % 2 == 0);
        UNROLLED for (int i = 0; i < N; i += 2) {
            const Floats two = add(_mm256_unpacklo_ps(a[i], a[i + 1]), _mm256_unpackhi_ps(a[i], a[i + 1]));
            const __m128 half = _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
            _mm_storel_pi(reinterpret_cast<__m64*>(out + i), _mm_add_ps(half, _mm_movehl_ps(half, half)));
        }
    }
    static Floats swap(Floats a, int s) {
        const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_permutevar8x32_ps(a, _mm256_xor_si256(lanes, _mm256_set1_epi32(s)));
    }
    using Avx2::load;
    using Avx2::save;
};

}  // namespace

const Kernels kAvx2Kernels = kernels_of<Avx2, Avx2Symbols>();
const TrellisKernel kAvx2Trellis = settle_rows;
