// Weights in symbols, the quick path: levels, signs and inputs in fixed point.
#pragma once

#include "tiles.h"

namespace {

// Tiles whose scales are converted together, and room for as many groups and a vector more.
constexpr int64_t kBlockTiles = 16;
constexpr int64_t kBlockGroups = 2 * kBlockTiles + 16;

// Scales of one row from group `first` on, `count` of them, as floats.
template <class Isa>
void convert_scales(const SlabSymbols& weight, int64_t row, int64_t first, int64_t count, float* out) {
    const int64_t at = row * groups_of(weight) + first, there = weight.rows * groups_of(weight) - at;
    const Half* from = reinterpret_cast<const Half*>(weight.scales) + at;
    for (int64_t g = 0; g < count; g += Isa::kLanes) {
        Half last[Isa::kLanes] = {};
        const bool whole = g + Isa::kLanes <= there;
        if (!whole) memcpy(last, from + g, sizeof(Half) * static_cast<size_t>(there - g));
        Isa::save(Isa::expand(whole ? from + g : last, Isa::kLaneMask), out + g);
    }
}

// Sums of R rows and T tokens, in lanes.
template <class Isa, int T, int R>
struct QuickSums {
    typename Isa::Floats levels[R][T], background[R][T];
};

// R rows of one tile from row r on. Sums of products are chains of slow instructions, so the rows take turns. Split: both
// halves of the tile have scales of their own. `scales` has those of each row, of the halves at groups[0] and groups[1].
template <class Isa, int P, bool Split, int T, int R>
void add_quick_tile(const typename Isa::Tables& tables, const uint8_t* tile, int64_t r, const SymbolActivations& act,
                    int64_t t, const float (&scales)[R][kBlockGroups], const int64_t (&groups)[2],
                    QuickSums<Isa, T, R>& sums) {
    constexpr int kParts = Split ? 2 : 1;
    const int64_t padded = act.tiles * kTileColumns;
    typename Isa::Symbols symbols[R];
    typename Isa::Sums levels[R][kParts][T], background[R][T];
    UNROLLED for (int i = 0; i < R; ++i) {
        symbols[i] = load_row<Isa, P>(tile, r + i);
        UNROLLED for (int token = 0; token < T; ++token) {
            UNROLLED for (int part = 0; part < kParts; ++part) levels[i][part][token] = Isa::no_sums();
            background[i][token] = Isa::no_sums();
        }
    }
    UNROLLED for (int64_t h = 0; h < kChunks; ++h) {
        const int64_t column = t * kTileColumns + h * kChunk, part = Split ? h / 2 : 0;
        UNROLLED for (int i = 0; i < R; ++i) {
            const auto index = Isa::template index<P>(symbols[i], h);
            const auto a = Isa::template levels<P>(tables, index);
            const auto b = Isa::template backgrounds<P>(tables, index);
            UNROLLED for (int token = 0; token < T; ++token) {
                const int64_t at = token * padded + column;
                levels[i][part][token] = Isa::dot(levels[i][part][token], a, act.x16 + at);
                background[i][token] = Isa::dot(background[i][token], b, act.z16 + at);
            }
        }
    }
    UNROLLED for (int token = 0; token < T; ++token) {
        const auto scale = Isa::broadcast(act.x_scales[token * act.tiles + t]);
        const auto low = Isa::broadcast(act.z_scales[token * act.tiles + t]);
        UNROLLED for (int i = 0; i < R; ++i) {
            UNROLLED for (int part = 0; part < kParts; ++part) {
                const auto products = Isa::mul(scale, Isa::to_floats(levels[i][part][token]));
                const auto s = Isa::broadcast(scales[i][groups[part]]);
                sums.levels[i][token] = Isa::fma(products, s, sums.levels[i][token]);
            }
            const auto signs = Isa::to_floats(background[i][token]);
            sums.background[i][token] = Isa::fma(low, signs, sums.background[i][token]);
        }
    }
}

// R rows from `row` on, or those of them before `end`; the others are computed with the last one's scales.
template <class Isa, int P, bool Split, int T, int R>
void quick_symbol_tile_rows(const SlabSymbols& weight, const TileReader<P>& reader, const typename Isa::Tables& tables,
                            const SymbolActivations& act, const Output& output, int64_t row, int64_t end) {
    QuickSums<Isa, T, R> sums;
    UNROLLED for (int r = 0; r < R; ++r) {
        UNROLLED for (int token = 0; token < T; ++token) {
            sums.levels[r][token] = sums.background[r][token] = Isa::zero();
        }
    }
    for (int64_t start = 0; start < act.tiles; start += kBlockTiles) {
        const int64_t stop = start + kBlockTiles < act.tiles ? start + kBlockTiles : act.tiles;
        const int64_t first = act.groups[2 * start], groups = act.groups[2 * stop - 1] - first + 1;
        float scales[R][kBlockGroups];
        for (int r = 0; r < R; ++r) {
            convert_scales<Isa>(weight, row + r < end ? row + r : end - 1, first, groups, scales[r]);
        }
        for (int64_t t = start; t < stop; ++t) {
            const uint8_t* tile = reader.tile(t);
            if (row % kTileRows == 0) reader.fetch(t);
            const int64_t group[2] = {act.groups[2 * t] - first, act.groups[2 * t + 1] - first};
            add_quick_tile<Isa, P, Split, T, R>(tables, tile, row % kTileRows, act, t, scales, group, sums);
        }
    }
    UNROLLED for (int r = 0; r < R; ++r) {
        if (row + r >= end) break;
        const auto u = Isa::broadcast(half_at(weight.left, row + r));
        UNROLLED for (int token = 0; token < T; ++token) {
            const auto both = Isa::fma(u, sums.background[r][token], sums.levels[r][token]);
            store(output, weight.rows, row + r, token, Isa::total(both));
        }
    }
}

template <class Isa, int P, bool Split, int T>
void quick_symbol_rows(const SlabSymbols& weight, const SymbolActivations& act, const Output& output, int64_t begin,
                       int64_t end) {
    constexpr int R = Isa::quick_rows(T);
    const Alphabet alphabet(weight);
    const float largest = alphabet.largest(), unit = largest > 0.0f ? kLargestLevel / largest : 0.0f;
    int16_t levels[kTable], background[kTable];
    for (int k = 0; k < kTable; ++k) {
        levels[k] = static_cast<int16_t>(__builtin_rintf(alphabet.level[k] * unit));
        background[k] = static_cast<int16_t>(alphabet.background[k]);
    }
    const auto tables = Isa::tables(levels, background);
    for (int64_t four = begin; four < end; four += kTileRows) {
        const TileReader<P> reader(weight, four);
        for (int64_t row = four; row < end && row < four + kTileRows; row += R) {
            quick_symbol_tile_rows<Isa, P, Split, T, R>(weight, reader, tables, act, output, row, end);
        }
    }
}

}  // namespace
