// Weights in symbols, the quick path: levels, signs and inputs in fixed point.
#pragma once

#include "tiles.h"

namespace {

// Tiles whose scales are converted together, and room for as many groups and a vector more.
constexpr int64_t kBlockTiles = 16;
constexpr int64_t kBlockGroups = 2 * kBlockTiles + 16;
// Rows whose u are converted together.
constexpr int64_t kLeftRows = 16;

// `count` halves as floats, or as many as `there` are; multiples of kLanes are written. The end of the memory is a case of
// its own, and out of the way: four rows begin with this.
template <class Isa>
[[gnu::noinline, gnu::cold]] void convert_last(const Half* halves, int64_t count, int64_t there, float* out) {
    for (int64_t k = 0; k < count && k < there; k += Isa::kLanes) {
        Half lanes[Isa::kLanes] = {};
        const int64_t left = there - k < Isa::kLanes ? there - k : Isa::kLanes;
        memcpy(lanes, halves + k, sizeof(Half) * static_cast<size_t>(left));
        Isa::save(Isa::expand(lanes, Isa::kLaneMask), out + k);
    }
}

template <class Isa>
inline void convert(const uint16_t* from, int64_t count, int64_t there, float* out) {
    const Half* halves = reinterpret_cast<const Half*>(from);
    if (count + Isa::kLanes > there) return convert_last<Isa>(halves, count, there, out);
    for (int64_t k = 0; k < count; k += Isa::kLanes) Isa::save(Isa::expand(halves + k, Isa::kLaneMask), out + k);
}

// Sums of R rows and T tokens, in lanes.
template <class Isa, int T, int R>
struct QuickSums {
    typename Isa::Floats levels[R][T], background[R][T];
};

// R rows of one tile from row r on. Sums of products are chains of slow instructions, so the rows take turns. Split: both
// halves of the tile have scales of their own. `scales` has those of each row, of the halves at groups[0] and groups[1].
// Of a tile beside nothing, half the chunks are enough.
template <class Isa, int P, bool Split, int T, int R, int64_t Chunks>
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
    UNROLLED for (int64_t h = 0; h < Chunks; ++h) {
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

// R rows from `row` on, or those of them before `end`; the others are computed with the last one's scales. `left` has u
// of each row.
template <class Isa, int P, bool Split, int T, int R>
void quick_symbol_tile_rows(const SlabSymbols& weight, const TileReader<P>& reader, const typename Isa::Tables& tables,
                            const SymbolActivations& act, const Output& output, const float* left, int64_t row,
                            int64_t end) {
    QuickSums<Isa, T, R> sums;
    UNROLLED for (int r = 0; r < R; ++r) {
        UNROLLED for (int token = 0; token < T; ++token) {
            sums.levels[r][token] = sums.background[r][token] = Isa::zero();
        }
    }
    const int64_t row_groups = act.groups[2 * act.tiles - 1] + 1;
    for (int64_t start = 0; start < act.tiles; start += kBlockTiles) {
        const int64_t stop = start + kBlockTiles < act.tiles ? start + kBlockTiles : act.tiles;
        const int64_t first = act.groups[2 * start], groups = act.groups[2 * stop - 1] - first + 1;
        float scales[R][kBlockGroups];
        for (int r = 0; r < R; ++r) {
            const int64_t at = (row + r < end ? row + r : end - 1) * row_groups + first;
            convert<Isa>(weight.scales + at, groups, weight.rows * row_groups - at, scales[r]);
        }
        const auto add = [&](auto chunks, int64_t t) {
            const int64_t group[2] = {act.groups[2 * t] - first, act.groups[2 * t + 1] - first};
            add_quick_tile<Isa, P, Split, T, R, chunks.value>(tables, reader.tile(t), row % kTileRows, act, t, scales,
                                                              group, sums);
        };
        const int64_t whole = stop < reader.whole ? stop : reader.whole;
        for (int64_t t = start; t < whole; ++t) {
            if (row % kTileRows == 0) reader.fetch(t);
            add(Constant<kChunks>(), t);
        }
        if (whole < stop) add(Constant<kChunks / 2>(), whole);
    }
    typename Isa::Floats both[R * T];
    UNROLLED for (int r = 0; r < R; ++r) {
        const auto u = Isa::broadcast(left[r]);
        UNROLLED for (int token = 0; token < T; ++token) {
            both[r * T + token] = Isa::fma(u, sums.background[r][token], sums.levels[r][token]);
        }
    }
    float totals[R * T];
    Isa::totals(both, totals);
    for (int r = 0; r < R && row + r < end; ++r) {
        for (int token = 0; token < T; ++token) store(output, weight.rows, row + r, token, totals[r * T + token]);
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
    float left[kLeftRows] = {};
    for (int64_t four = begin; four < end; four += kTileRows) {
        const int64_t at = (four - begin) % kLeftRows;
        if (at == 0) convert<Isa>(weight.left + four, kLeftRows, weight.rows - four, left);
        const TileReader<P> reader(weight, four);
        for (int64_t row = four; row < end && row < four + kTileRows; row += R) {
            quick_symbol_tile_rows<Isa, P, Split, T, R>(weight, reader, tables, act, output, left + at + row - four, row,
                                                        end);
        }
    }
}

}  // namespace
