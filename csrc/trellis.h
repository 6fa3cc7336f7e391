// Trellis-coded symbols for the columns of a block, one after the other: the search of slablm/methods/trellis.py.
//
// A vector holds the same row of several tiles, a batch. Of every row there are four ways, by the parity above and its
// own, each with the nearest level and its squared distance. Rows 0 and 1 become a pair that is known by the parity
// before it and its last, with the better of the parities between; so do rows 2 and 3. Of the four ways to close the
// cycle of two pairs the best is taken.
//
// The error of a column is not fed into all others at once: a column takes those of all before it when its turn comes,
// which writes nothing, and reads the errors of a batch where they lie together.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "slablm.h"

// Rows, parities and levels become constants.
#define UNROLLED_ALL _Pragma("GCC unroll 32")

namespace {

#if defined(__AVX512F__)
constexpr int kTrellisLanes = 16;
#elif defined(__AVX2__)
constexpr int kTrellisLanes = 8;
#else
constexpr int kTrellisLanes = 4;
#endif
constexpr int64_t kBatchRows = kTileRows * kTrellisLanes;
static_assert(kBatchRows <= kMostBatchRows);

typedef float TileFloats __attribute__((vector_size(4 * kTrellisLanes)));
typedef int32_t TileInts __attribute__((vector_size(4 * kTrellisLanes)));  // of a condition: -1 or 0

inline TileFloats all(float value) { return value - TileFloats{}; }

// Levels by parity, ascending, and the midpoints between neighbours.
struct TrellisLevels {
    alignas(64) float level[2][32] = {}, middle[2][32] = {};

    TrellisLevels(const float* levels, int64_t bits) {
        const int64_t half = int64_t{1} << (bits - 1);
        for (int64_t c = 0; c < 2 * half; ++c) level[c % 2][c / 2] = levels[c];
        for (int parity = 0; parity < 2; ++parity) {
            for (int64_t i = 0; i + 1 < half; ++i) middle[parity][i] = (level[parity][i] + level[parity][i + 1]) / 2;
        }
    }
};

// The rows of a batch, each in a vector.
struct TileRows {
    TileFloats row[kTileRows];
};

// From rows as they follow each other. Neither this nor `join` is inlined: then GCC would move lane by lane.
__attribute__((noinline)) TileRows split(const float* __restrict rows) {
    TileRows out;
    float* __restrict lanes = reinterpret_cast<float*>(&out);
    for (int tile = 0; tile < kTrellisLanes; ++tile) {
        for (int i = 0; i < kTileRows; ++i) lanes[i * kTrellisLanes + tile] = rows[tile * kTileRows + i];
    }
    return out;
}

__attribute__((noinline)) void join(const TileRows& split, float* __restrict rows) {
    const float* lanes = reinterpret_cast<const float*>(&split);
    for (int tile = 0; tile < kTrellisLanes; ++tile) {
        for (int i = 0; i < kTileRows; ++i) rows[tile * kTileRows + i] = lanes[i * kTrellisLanes + tile];
    }
}

// --- One row -------------------------------------------------------------------------------------------------------

struct Nearest {
    TileInts index;
    TileFloats level;
};

// The level of a parity next to `sought`; of two that are equally near the lower one.
template <int P>
Nearest nearest(const TrellisLevels& levels, int parity, TileFloats sought) {
    TileInts index{};
#if defined(__AVX512F__)
    // A table of 16 floats is one register, one of 32 two: as many steps as there are bits but one, each with a midpoint
    // looked up.
    const auto look_up = [](TileInts at, const float* table) {
        const __m512i lanes = reinterpret_cast<__m512i>(at);
        const __m512 first = _mm512_load_ps(table);
        if (P < 6) return reinterpret_cast<TileFloats>(_mm512_permutexvar_ps(lanes, first));
        return reinterpret_cast<TileFloats>(_mm512_permutex2var_ps(first, lanes, _mm512_load_ps(table + 16)));
    };
    UNROLLED_ALL for (int step = 1 << (P - 2); step > 0; step /= 2) {
        index = sought > look_up(index + (step - 1), levels.middle[parity]) ? index + step : index;
    }
    return {index, look_up(index, levels.level[parity])};
#else
    TileFloats level = all(levels.level[parity][0]);
    UNROLLED_ALL for (int i = 1; i < 1 << (P - 1); ++i) {
        const TileInts beyond = sought > levels.middle[parity][i - 1];
        level = beyond ? all(levels.level[parity][i]) : level;
        index -= beyond;
    }
    return {index, level};
#endif
}

// By the parity above and the row's own.
struct RowWays {
    TileInts index[2][2];
    TileFloats value[2][2], distance[2][2];
};

// `odd_cost` is added to the distances of odd symbols.
template <int P>
void find_ways(const TrellisLevels& levels, TileFloats target, TileFloats scale, TileFloats inverse,
               TileFloats odd_cost, RowWays& out) {
    const TileFloats relative = target * inverse;
    UNROLLED_ALL for (int above = 0; above < 2; ++above) {
        UNROLLED_ALL for (int parity = 0; parity < 2; ++parity) {
            const Nearest found = nearest<P>(levels, parity, above == 0 ? relative : -relative);
            const TileFloats value = (above == 0 ? found.level : -found.level) * scale, difference = value - target;
            const TileFloats distance = difference * difference;
            out.index[above][parity] = found.index;
            out.value[above][parity] = value;
            out.distance[above][parity] = parity == 0 ? distance : distance + odd_cost;
        }
    }
}

// --- Four rows -----------------------------------------------------------------------------------------------------

// Two rows, by the parity before the first and that of the second: the distance, and whether the first one's is odd.
struct PairWays {
    TileFloats distance[2][2];
    TileInts between[2][2];
};

inline PairWays pair(const RowWays& first, const RowWays& second) {
    PairWays out;
    UNROLLED_ALL for (int before = 0; before < 2; ++before) {
        UNROLLED_ALL for (int last = 0; last < 2; ++last) {
            const TileFloats even = first.distance[before][0] + second.distance[0][last];
            const TileFloats odd = first.distance[before][1] + second.distance[1][last];
            out.between[before][last] = odd < even;
            out.distance[before][last] = odd < even ? odd : even;
        }
    }
    return out;
}

template <class Vector>
Vector choose(const Vector (&ways)[2][2], TileInts above, TileInts own) {
    return above ? (own ? ways[1][1] : ways[1][0]) : (own ? ways[0][1] : ways[0][0]);
}

// The best way of every tile: its values, and its symbols, of row i in byte i.
inline TileInts best_ways(const RowWays (&ways)[kTileRows], TileRows& values) {
    const PairWays upper = pair(ways[0], ways[1]), lower = pair(ways[2], ways[3]);
    TileFloats best = upper.distance[0][0] + lower.distance[0][0];
    TileInts odd[kTileRows] = {};
    UNROLLED_ALL for (int way = 1; way < 4; ++way) {
        const int last = way / 2, second = way % 2;
        const TileFloats distance = upper.distance[last][second] + lower.distance[second][last];
        const TileInts better = distance < best;
        best = better ? distance : best;
        odd[1] = better ? -second - TileInts{} : odd[1];
        odd[3] = better ? -last - TileInts{} : odd[3];
    }
    odd[0] = choose(upper.between, odd[3], odd[1]);
    odd[2] = choose(lower.between, odd[1], odd[3]);
    TileInts codes{};
    UNROLLED_ALL for (int i = 0; i < kTileRows; ++i) {
        const TileInts above = odd[(i + 3) % 4];
        values.row[i] = choose(ways[i].value, above, odd[i]);
        codes |= (2 * choose(ways[i].index, above, odd[i]) - odd[i]) << (8 * i);
    }
    return codes;
}

// --- A block -------------------------------------------------------------------------------------------------------

// Numbers of the rows of a batch, of which `count` are there; the others are 0.
inline void load_rows(const float* from, int64_t count, float* to) {
    if (count == kBatchRows) {
        memcpy(to, from, sizeof(float) * kBatchRows);
    } else {
        memset(to, 0, sizeof(float) * kBatchRows);
        memcpy(to, from, sizeof(float) * static_cast<size_t>(count));
    }
}

// Column j less the errors of those before it.
inline void load_column(const TrellisBlock& block, int64_t first, int64_t count, int64_t j, const float* errors,
                        float* to) {
    load_rows(block.current + j * block.rows + first, count, to);
    TileFloats rows[kTileRows];
    memcpy(rows, to, sizeof rows);
    for (int64_t k = 0; k < j; ++k) {
        const TileFloats* error = reinterpret_cast<const TileFloats*>(errors + k * kBatchRows);
        const float coefficient = block.coefficients[j * block.columns + k];
        UNROLLED_ALL for (int i = 0; i < kTileRows; ++i) rows[i] -= coefficient * error[i];
    }
    memcpy(to, rows, sizeof rows);
}

// All columns of the batch that begins with row `first`. `errors` has room for those of [columns, kBatchRows].
template <int P>
void settle_batch(const TrellisBlock& block, const TrellisLevels& levels, int64_t first, float* errors) {
    constexpr float kTiny = 1.17549435e-38f;
    const int64_t rows = block.rows, count = rows - first < kBatchRows ? rows - first : kBatchRows;
    const size_t bytes = sizeof(float) * static_cast<size_t>(count);
    alignas(64) float column[kBatchRows], fresh[kBatchRows];
    load_rows(block.scales + first, count, column);
    const TileRows scale = split(column);
    for (float& s : column) s = 1.0f / (s > kTiny ? s : kTiny);
    const TileRows inverse = split(column);
    // Rows that are not there have symbols 0: numbers and scales of 0, so that these cost nothing, and no odd symbol.
    for (int64_t i = 0; i < kBatchRows; ++i) column[i] = i < count ? 0.0f : __builtin_inff();
    const TileRows odd_cost = split(column);
    for (int64_t j = 0; j < block.columns; ++j, errors += kBatchRows) {
        const int64_t at = j * rows + first;
        load_column(block, first, count, j, errors - j * kBatchRows, column);
        const TileRows target = split(column);
        RowWays ways[kTileRows];
        UNROLLED_ALL for (int i = 0; i < kTileRows; ++i) {
            find_ways<P>(levels, target.row[i], scale.row[i], inverse.row[i], odd_cost.row[i], ways[i]);
        }
        TileRows values;
        const TileInts codes = best_ways(ways, values);
        join(values, fresh);
        if (block.before != nullptr) load_rows(block.before + at, count, column);
        for (int64_t i = 0; i < kBatchRows; ++i) errors[i] = (column[i] - fresh[i]) / block.divisors[j];
        memcpy(block.codes + at, &codes, static_cast<size_t>(count));
        memcpy(block.fresh + at, fresh, bytes);
        memcpy(block.errors + at, errors, bytes);
    }
}

// The batches that begin in rows [begin, end).
template <int P>
void settle_batches(const TrellisBlock& block, int64_t begin, int64_t end, float* scratch) {
    const TrellisLevels levels(block.levels, P);
    const int64_t first = (begin + kBatchRows - 1) / kBatchRows * kBatchRows;
    for (int64_t row = first; row < end; row += kBatchRows) settle_batch<P>(block, levels, row, scratch);
}

void settle_rows(const TrellisBlock& block, int64_t begin, int64_t end, float* scratch) {
    if (block.bits == 2) return settle_batches<2>(block, begin, end, scratch);
    if (block.bits == 3) return settle_batches<3>(block, begin, end, scratch);
    if (block.bits == 4) return settle_batches<4>(block, begin, end, scratch);
    if (block.bits == 5) return settle_batches<5>(block, begin, end, scratch);
    settle_batches<6>(block, begin, end, scratch);
}

}  // namespace
