// The loops that every instruction set shares, as templates over a struct `Isa` of primitive operations.
//
// Included once per translation unit. Everything is in an unnamed namespace and nothing of the standard library's
// templates is used: an inline function compiled with AVX-512 flags must never be the copy the linker keeps for all.
//
// Isa offers, with Floats a vector of kLanes floats:
//   Bits, bits(word)                     a plane word, ready for `select`
//   select(bits, c, off, on)             lanes 0 ... of chunk c of the word: on where the bit is set, else off
//   load(const Value*)                   kLanes floats, or 16-bit or int8 numbers as floats
//   expand(const Value*, mask)           consecutive values to the set lanes of a chunk, as floats; rest arbitrary
//   Word, word(planes, plane_count)      the plane words of 64 columns, ready for `values8` and `signs8`
//   Bytes, values8(const int8_t*, Word)  64 int8 lanes: consecutive values where kept, 0 elsewhere
//   Signs, signs8(Word)                  64 lanes: 0 where kept, -1 where minus, +1 elsewhere
//   dot(Bytes, x16), dot(Signs, z16)     64 products, summed over parts as floats, times kUnit
//   kExactRows                           rows read together with one token
//   kQuickTokens                         up to so many tokens, fixed point is faster than floats
//   group(g)                             where the g-th 8 columns of a word stand in x16 and z16
#pragma once

#include <string.h>

#include "activations.h"
#include "slablm.h"

// Chunk numbers become constants.
#define UNROLLED _Pragma("GCC unroll 16")

namespace {

inline void store(const Output& output, int64_t rows, int64_t row, int64_t token, float value) {
    if (token < output.tokens) write(value, output.data, output.type, token * rows + row);
}

// --- Memory ahead --------------------------------------------------------------------------------------------------

// Rows follow each other in memory, but a row is too short for the hardware to keep two streams running across pages.
// So each word asks for the same word some rows further on: at least kBytesAhead away, a multiple of the `group` rows
// read together. Asking for memory beyond the end is harmless.
constexpr int64_t kBytesAhead = 4096;

struct Ahead {
    int64_t values, planes;  // distances in bytes

    Ahead(const SlabWeight& weight, int64_t value_bytes, int64_t group) {
        const int64_t row_values = weight.kept * value_bytes;
        const int64_t row_planes = padded_words(weight) * weight.plane_count * 8;
        const int64_t rows = (kBytesAhead / (row_values + row_planes) + group) / group * group;
        values = rows * row_values;
        planes = rows * row_planes;
    }

    void fetch(const void* at_values, const void* at_planes) const {
        __builtin_prefetch(static_cast<const char*>(at_values) + values);
        __builtin_prefetch(static_cast<const char*>(at_planes) + planes);
    }
};

// --- Weights as floats ---------------------------------------------------------------------------------------------

// What stands at positions that are not kept: nothing, +-u v, or the general sum.
enum class Background { kNone, kRankOne, kGeneral };

inline float value_scale(const SlabWeight& weight, int64_t row) {
    return weight.scales != nullptr ? weight.scales[row] : 1.0f;
}

// One row of the weight, read word by word from left to right.
template <class Isa, class Value, Background B>
struct RowReader {
    using Floats = typename Isa::Floats;

    const SlabWeight* weight;
    const uint64_t* planes;
    const Value* values;
    const float* left;
    Floats scale, plus, minus;
    uint64_t kept;
    typename Isa::Bits kept_bits, minus_bits;

    void start(const SlabWeight& w, int64_t row) {
        weight = &w;
        planes = w.planes + row * padded_words(w) * w.plane_count;
        values = static_cast<const Value*>(w.values) + row * w.kept;
        left = w.left + row * w.rank;
        scale = Isa::broadcast(value_scale(w, row));
        plus = Isa::broadcast(B == Background::kRankOne ? left[0] : 1.0f);
        minus = Isa::broadcast(B == Background::kRankOne ? -left[0] : -1.0f);
    }

    void next_word() {
        kept = planes[0];
        kept_bits = Isa::bits(kept);
        if (B != Background::kNone) minus_bits = Isa::bits(weight->plane_count == 2 ? planes[1] : 0);
        planes += weight->plane_count;
    }

    // Lanes of chunk c of the current word; `right` is v at its first column.
    Floats chunk(int64_t c, const float* right) {
        const uint64_t mask = kept >> (c * Isa::kLanes) & Isa::kLaneMask;
        Floats entries = Isa::expand(values, mask);
        if (sizeof(Value) == 1) entries = Isa::mul(entries, scale);
        values += __builtin_popcountll(mask);
        Floats background = Isa::zero();
        if (B == Background::kRankOne) {
            background = Isa::mul(Isa::select(minus_bits, c, plus, minus), Isa::load(right));
        } else if (B == Background::kGeneral) {
            const int64_t stride = padded_words(*weight) * kWordBits;
            for (int64_t q = 0; q < weight->rank; ++q) {
                background = Isa::add(background, Isa::mul(Isa::broadcast(left[q]), Isa::load(right + q * stride)));
            }
            background = Isa::mul(Isa::select(minus_bits, c, plus, minus), background);
        }
        return Isa::select(kept_bits, c, background, entries);
    }
};

template <class Isa, class Value, Background B, int T, int R>
void exact_rows(const SlabWeight& weight, const Activations& act, const Output& output, int64_t row) {
    const int64_t words = padded_words(weight), padded = words * kWordBits;
    RowReader<Isa, Value, B> reader[R];
    const Ahead ahead(weight, sizeof(Value), R);
    typename Isa::Floats sum[R][T];
    for (int r = 0; r < R; ++r) {
        reader[r].start(weight, row + r);
        for (int t = 0; t < T; ++t) sum[r][t] = Isa::zero();
    }
    for (int64_t w = 0; w < words; ++w) {
        for (int r = 0; r < R; ++r) {
            ahead.fetch(reader[r].values, reader[r].planes);
            reader[r].next_word();
        }
        UNROLLED for (int64_t c = 0; c < kWordBits / Isa::kLanes; ++c) {
            const int64_t column = w * kWordBits + c * Isa::kLanes;
            for (int r = 0; r < R; ++r) {
                const auto entries = reader[r].chunk(c, weight.right + column);
                for (int t = 0; t < T; ++t) {
                    sum[r][t] = Isa::fma(entries, Isa::load(act.x + t * padded + column), sum[r][t]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) store(output, weight.rows, row + r, t, Isa::total(sum[r][t]));
    }
}

// --- Fixed-point activations ----------------------------------------------------------------------------------------------

template <class Isa, Background B, int T>
void quick_row(const SlabWeight& weight, const Activations& act, const Output& output, int64_t row) {
    using Floats = typename Isa::Floats;
    constexpr int64_t kRanks = B == Background::kNone ? 0 : B == Background::kRankOne ? 1 : kMaxQuickRank;
    const int64_t words = padded_words(weight), padded = words * kWordBits;
    const int64_t rank = B == Background::kGeneral ? weight.rank : kRanks;
    const int64_t plane_count = B == Background::kRankOne ? 2 : weight.plane_count;
    const Ahead ahead(weight, 1, 1);
    const uint64_t* planes = weight.planes + row * words * plane_count;
    const int8_t* values = static_cast<const int8_t*>(weight.values) + row * weight.kept;
    Floats sum[T], low[kRanks > 0 ? kRanks : 1][T];
    for (int t = 0; t < T; ++t) sum[t] = Isa::zero();
    for (int64_t q = 0; q < rank; ++q) {
        for (int t = 0; t < T; ++t) low[q][t] = Isa::zero();
    }
    for (int64_t w = 0; w < words; ++w, planes += plane_count) {
        const int64_t column = w * kWordBits;
        ahead.fetch(values, planes);
        const auto word = Isa::word(planes, plane_count);
        const auto entries = Isa::values8(values, word);
        values += __builtin_popcountll(planes[0]);
        for (int t = 0; t < T; ++t) {
            const Floats scale = Isa::broadcast(act.x_scales[t * words + w]);
            sum[t] = Isa::fma(scale, Isa::dot(entries, act.x16 + t * padded + column), sum[t]);
        }
        if (B == Background::kNone) continue;
        const auto signs = Isa::signs8(word);
        for (int64_t q = 0; q < rank; ++q) {
            for (int t = 0; t < T; ++t) {
                const int64_t qt = q * T + t;
                const Floats scale = Isa::broadcast(act.z_scales[qt * words + w]);
                low[q][t] = Isa::fma(scale, Isa::dot(signs, act.z16 + qt * padded + column), low[q][t]);
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        float total = weight.scales[row] * Isa::total(sum[t]);
        for (int64_t q = 0; q < rank; ++q) total += weight.left[row * rank + q] * Isa::total(low[q][t]);
        store(output, weight.rows, row, t, total);
    }
}

// --- Choosing the instance -----------------------------------------------------------------------------------------

inline Background background_of(const SlabWeight& weight) {
    if (weight.rank == 0) return Background::kNone;
    return weight.rank == 1 && weight.plane_count == 2 ? Background::kRankOne : Background::kGeneral;
}

template <class Isa, class Value, Background B, int T>
void exact_range(const SlabWeight& weight, const Activations& act, const Output& output, int64_t row, int64_t end) {
    constexpr int R = T == 1 ? Isa::kExactRows : 1;
    for (; row + R <= end; row += R) exact_rows<Isa, Value, B, T, R>(weight, act, output, row);
    for (; row < end; ++row) exact_rows<Isa, Value, B, T, 1>(weight, act, output, row);
}

template <class Isa, class Value, Background B>
void exact_tokens(const SlabWeight& weight, const Activations& act, const Output& output, int64_t row, int64_t end) {
    if (act.tokens == 1) return exact_range<Isa, Value, B, 1>(weight, act, output, row, end);
    if (act.tokens == 2) return exact_range<Isa, Value, B, 2>(weight, act, output, row, end);
    if (act.tokens == 4) return exact_range<Isa, Value, B, 4>(weight, act, output, row, end);
    exact_range<Isa, Value, B, 8>(weight, act, output, row, end);
}

template <class Isa, class Value>
void exact_background(const SlabWeight& weight, const Activations& act, const Output& out, int64_t row, int64_t end) {
    const Background b = background_of(weight);
    if (b == Background::kNone) return exact_tokens<Isa, Value, Background::kNone>(weight, act, out, row, end);
    if (b == Background::kRankOne) return exact_tokens<Isa, Value, Background::kRankOne>(weight, act, out, row, end);
    exact_tokens<Isa, Value, Background::kGeneral>(weight, act, out, row, end);
}

template <class Isa>
void exact(const SlabWeight& weight, const Activations& act, const Output& out, int64_t row, int64_t end) {
    if (weight.value_type == kFloat16) return exact_background<Isa, Half>(weight, act, out, row, end);
    if (weight.value_type == kBFloat16) return exact_background<Isa, BFloat>(weight, act, out, row, end);
    exact_background<Isa, int8_t>(weight, act, out, row, end);
}

template <class Isa, Background B, int T>
void quick_range(const SlabWeight& weight, const Activations& act, const Output& output, int64_t row, int64_t end) {
    if constexpr (T <= Isa::kQuickTokens) {
        for (; row < end; ++row) quick_row<Isa, B, T>(weight, act, output, row);
    }
}

template <class Isa, Background B>
void quick_tokens(const SlabWeight& weight, const Activations& act, const Output& output, int64_t row, int64_t end) {
    if (act.tokens == 1) return quick_range<Isa, B, 1>(weight, act, output, row, end);
    if (act.tokens == 2) return quick_range<Isa, B, 2>(weight, act, output, row, end);
    quick_range<Isa, B, 4>(weight, act, output, row, end);
}

template <class Isa>
void quick(const SlabWeight& weight, const Activations& act, const Output& output, int64_t row, int64_t end) {
    const Background b = background_of(weight);
    if (b == Background::kNone) return quick_tokens<Isa, Background::kNone>(weight, act, output, row, end);
    if (b == Background::kRankOne) return quick_tokens<Isa, Background::kRankOne>(weight, act, output, row, end);
    quick_tokens<Isa, Background::kGeneral>(weight, act, output, row, end);
}

// --- A weight without planes ---------------------------------------------------------------------------------------

// One row, from left to right: a single stream is what memory is fastest at. A sums take turns.
template <class Isa, class Value, int T>
void dense_row(const SlabWeight& weight, const uint16_t* scales, const Activations& act, const Output& output,
               int64_t row) {
    constexpr int64_t kLanes = Isa::kLanes, A = T <= 2 ? 4 : 8 / T;
    const int64_t n = weight.columns, padded = padded_words(weight) * kWordBits;
    const Value* values = static_cast<const Value*>(weight.values) + row * n;
    typename Isa::Floats sum[A][T];
    for (auto& sums : sum) {
        for (auto& one : sums) one = Isa::zero();
    }
    const auto add = [&](int64_t column, int64_t a, const Value* from) {
        const auto entries = Isa::load(from);
        for (int t = 0; t < T; ++t) sum[a][t] = Isa::fma(entries, Isa::load(act.x + t * padded + column), sum[a][t]);
    };
    int64_t column = 0;
    for (; column + A * kLanes <= n; column += A * kLanes) {
        __builtin_prefetch(reinterpret_cast<const char*>(values + column) + kBytesAhead);
        __builtin_prefetch(reinterpret_cast<const char*>(values + column) + kBytesAhead + 64);
        UNROLLED for (int64_t a = 0; a < A; ++a) add(column + a * kLanes, a, values + column + a * kLanes);
    }
    for (; column + kLanes <= n; column += kLanes) add(column, 0, values + column);
    if (column < n) {
        Value last[kLanes] = {};
        memcpy(last, values + column, sizeof(Value) * static_cast<size_t>(n - column));
        add(column, 0, last);
    }
    const float scale = scales == nullptr ? 1.0f : to_float(Half{scales[row]});
    for (int t = 0; t < T; ++t) {
        for (int64_t a = 1; a < A; ++a) sum[0][t] = Isa::add(sum[0][t], sum[a][t]);
        store(output, weight.rows, row, t, scale * Isa::total(sum[0][t]));
    }
}

template <class Isa, class Value, int T>
void dense_range(const SlabWeight& weight, const uint16_t* scales, const Activations& act, const Output& output,
                 int64_t row, int64_t end) {
    for (; row < end; ++row) dense_row<Isa, Value, T>(weight, scales, act, output, row);
}

template <class Isa, class Value>
void dense_tokens(const SlabWeight& weight, const uint16_t* scales, const Activations& act, const Output& output,
                  int64_t row, int64_t end) {
    if (act.tokens == 1) return dense_range<Isa, Value, 1>(weight, scales, act, output, row, end);
    if (act.tokens == 2) return dense_range<Isa, Value, 2>(weight, scales, act, output, row, end);
    if (act.tokens == 4) return dense_range<Isa, Value, 4>(weight, scales, act, output, row, end);
    dense_range<Isa, Value, 8>(weight, scales, act, output, row, end);
}

template <class Isa>
void dense(const SlabWeight& weight, const uint16_t* scales, const Activations& act, const Output& output, int64_t row,
           int64_t end) {
    if (weight.value_type == kFloat16) return dense_tokens<Isa, Half>(weight, scales, act, output, row, end);
    if (weight.value_type == kBFloat16) return dense_tokens<Isa, BFloat>(weight, scales, act, output, row, end);
    dense_tokens<Isa, int8_t>(weight, scales, act, output, row, end);
}

// --- Dense rows ----------------------------------------------------------------------------------------------------

template <class Isa, class Value, Background B, class Out>
void unpack_rows(const SlabWeight& weight, int64_t begin, int64_t end, Out* output) {
    const int64_t n = weight.columns;
    for (int64_t row = begin; row < end; ++row, output += n) {
        RowReader<Isa, Value, B> reader;
        reader.start(weight, row);
        for (int64_t word = 0; word < n; word += kWordBits) {
            reader.next_word();
            UNROLLED for (int64_t c = 0; c < kWordBits / Isa::kLanes; ++c) {
                const int64_t column = word + c * Isa::kLanes, left = n - column;
                if (left <= 0) break;
                const auto entries = reader.chunk(c, weight.right + column);
                if (left >= Isa::kLanes) {
                    Isa::save(entries, output + column);
                } else {
                    Out last[Isa::kLanes];
                    Isa::save(entries, last);
                    memcpy(output + column, last, sizeof(Out) * static_cast<size_t>(left));
                }
            }
        }
    }
}

template <class Isa, class Value, class Out>
void unpack_background(const SlabWeight& weight, int64_t begin, int64_t end, Out* out) {
    const Background b = background_of(weight);
    if (b == Background::kNone) return unpack_rows<Isa, Value, Background::kNone>(weight, begin, end, out);
    if (b == Background::kRankOne) return unpack_rows<Isa, Value, Background::kRankOne>(weight, begin, end, out);
    unpack_rows<Isa, Value, Background::kGeneral>(weight, begin, end, out);
}

template <class Isa, class Out>
void unpack_values(const SlabWeight& weight, int64_t begin, int64_t end, Out* output) {
    if (weight.value_type == kFloat16) return unpack_background<Isa, Half>(weight, begin, end, output);
    if (weight.value_type == kBFloat16) return unpack_background<Isa, BFloat>(weight, begin, end, output);
    unpack_background<Isa, int8_t>(weight, begin, end, output);
}

template <class Isa>
void unpack(const SlabWeight& weight, int64_t begin, int64_t end, void* output, int32_t output_type) {
    if (output_type == kFloat32) return unpack_values<Isa>(weight, begin, end, static_cast<float*>(output));
    unpack_values<Isa>(weight, begin, end, static_cast<BFloat*>(output));
}

}  // namespace
