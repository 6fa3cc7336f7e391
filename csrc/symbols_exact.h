// Weights in symbols, the exact path: entries as floats, multiplied or written out.
#pragma once

#include "tiles.h"

namespace {

// Calls take(column, entries) for all lanes of one row, from left to right.
template <class Isa, int P, class Take>
void each_entry(const SlabSymbols& weight, const TileReader<P>& reader, const typename Isa::Table& table, int64_t row,
                const Take& take) {
    const auto middle = Isa::broadcast(-kMiddle), step = Isa::broadcast(scale_of(weight, row) / kSteps);
    const int64_t tiles = tiles_of(weight), r = row % kTileRows;
    for (int64_t t = 0; t < tiles; ++t) {
        const auto above = load_row<Isa, P>(reader.tile(t), row_above(r)), own = load_row<Isa, P>(reader.tile(t), r);
        UNROLLED for (int64_t h = 0; h < kTileColumns / Isa::kChunk; ++h) {
            const auto bytes = Isa::template look_up<P>(table, Isa::template index<P>(above, h),
                                                        Isa::template index<P>(own, h));
            UNROLLED for (int64_t i = 0; i < Isa::kChunk / Isa::kLanes; ++i) {
                const auto entries = Isa::mul(Isa::add(Isa::floats(bytes, i), middle), step);
                take(t * kTileColumns + h * Isa::kChunk + i * Isa::kLanes, entries);
            }
        }
    }
}

// Calls each(row, reader, table) for rows [begin, end).
template <class Isa, int P, class Each>
void each_row(const SlabSymbols& weight, int64_t begin, int64_t end, const Each& each) {
    const auto table = Isa::template table<P>(Levels(weight));
    for (int64_t four = begin; four < end; four += kTileRows) {
        const TileReader<P> reader(weight, four);
        for (int64_t row = four; row < end && row < four + kTileRows; ++row) each(row, reader, table);
    }
}

template <class Isa, int P, int T>
void exact_symbol_rows(const SlabSymbols& weight, const SymbolActivations& act, const Output& output, int64_t begin,
                       int64_t end) {
    using Floats = typename Isa::Floats;
    const int64_t padded = act.tiles * kTileColumns;
    each_row<Isa, P>(weight, begin, end, [&](int64_t row, const auto& reader, const auto& table) {
        Floats sum[T];
        for (int t = 0; t < T; ++t) sum[t] = Isa::zero();
        each_entry<Isa>(weight, reader, table, row, [&](int64_t column, const Floats& entries) {
            for (int t = 0; t < T; ++t) sum[t] = Isa::fma(entries, Isa::load(act.x + t * padded + column), sum[t]);
        });
        for (int t = 0; t < T; ++t) store(output, weight.rows, row, t, Isa::total(sum[t]));
    });
}

template <class Isa, int P, class Out>
void unpack_symbol_rows(const SlabSymbols& weight, int64_t begin, int64_t end, Out* output) {
    using Floats = typename Isa::Floats;
    const int64_t n = weight.columns;
    each_row<Isa, P>(weight, begin, end, [&](int64_t row, const auto& reader, const auto& table) {
        Out* to = output + (row - begin) * n;
        each_entry<Isa>(weight, reader, table, row, [&](int64_t column, const Floats& entries) {
            if (column + Isa::kLanes <= n) return Isa::save(entries, to + column);
            if (column >= n) return;
            Out last[Isa::kLanes];
            Isa::save(entries, last);
            memcpy(to + column, last, sizeof(Out) * static_cast<size_t>(n - column));
        });
    });
}

}  // namespace
