// Weights in symbols, the quick path: bytes times inputs in fixed point.
#pragma once

#include "tiles.h"

namespace {

// R rows of one tile from row r on. Sums of products are chains of slow instructions, so the rows take turns. Of a tile
// beside nothing, half the chunks are enough.
template <class Isa, int P, int T, int R, int64_t Chunks>
void add_quick_tile(const typename Isa::Table& table, const uint8_t* tile, int64_t r, const SymbolActivations& act,
                    int64_t t, typename Isa::Floats (&sums)[R * T]) {
    typename Isa::Symbols above_first = load_row<Isa, P>(tile, row_above(r)), symbols[R];
    typename Isa::Sums products[R][T];
    UNROLLED for (int i = 0; i < R; ++i) {
        symbols[i] = load_row<Isa, P>(tile, r + i);
        UNROLLED for (int token = 0; token < T; ++token) {
            products[i][token] = Isa::start(act.starts + (token * act.tiles + t) * Isa::kLanes);
        }
    }
    UNROLLED for (int64_t h = 0; h < Chunks; ++h) {
        auto above = Isa::template index<P>(above_first, h);
        UNROLLED for (int i = 0; i < R; ++i) {
            const auto own = Isa::template index<P>(symbols[i], h);
            const auto bytes = Isa::template look_up<P>(table, above, own);
            above = own;
            UNROLLED for (int token = 0; token < T; ++token) {
                const int64_t at = (token * act.tiles + t) * kTileColumns + h * Isa::kChunk;
                products[i][token] = Isa::dot(products[i][token], bytes, act.x16 + at);
            }
        }
    }
    UNROLLED for (int token = 0; token < T; ++token) {
        const auto scale = Isa::broadcast(act.x_scales[token * act.tiles + t]);
        UNROLLED for (int i = 0; i < R; ++i) {
            auto& sum = sums[i * T + token];
            sum = Isa::fma(scale, Isa::to_floats(products[i][token]), sum);
        }
    }
}

// R rows from `row` on, of which those before `end` are stored.
template <class Isa, int P, int T, int R>
void quick_symbol_tile_rows(const SlabSymbols& weight, const TileReader<P>& reader, const typename Isa::Table& table,
                            const SymbolActivations& act, const Output& output, int64_t row, int64_t end) {
    const int64_t r = R == kTileRows ? 0 : row % kTileRows;
    typename Isa::Floats sums[R * T];
    UNROLLED for (auto& sum : sums) sum = Isa::zero();
    for (int64_t t = 0; t < reader.whole; ++t) {
        if (r == 0) reader.fetch(t);
        add_quick_tile<Isa, P, T, R, kTileColumns / Isa::kChunk>(table, reader.tile(t), r, act, t, sums);
    }
    if (reader.whole < act.tiles) {
        add_quick_tile<Isa, P, T, R, kWordBits / Isa::kChunk>(table, reader.last, r, act, reader.whole, sums);
    }
    float totals[R * T];
    Isa::totals(sums, totals);
    for (int i = 0; i < R && row + i < end; ++i) {
        const float s = scale_of(weight, row + i);
        for (int token = 0; token < T; ++token) store(output, weight.rows, row + i, token, s * totals[i * T + token]);
    }
}

template <class Isa, int P, int T>
void quick_symbol_rows(const SlabSymbols& weight, const SymbolActivations& act, const Output& output, int64_t begin,
                       int64_t end) {
    constexpr int R = Isa::quick_rows(T);
    const auto table = Isa::template table<P>(Levels(weight));
    for (int64_t four = begin; four < end; four += kTileRows) {
        const TileReader<P> reader(weight, four);
        for (int64_t row = four; row < end && row < four + kTileRows; row += R) {
            quick_symbol_tile_rows<Isa, P, T, R>(weight, reader, table, act, output, row, end);
        }
    }
}

}  // namespace
