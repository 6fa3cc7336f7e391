// Weights in symbols, the exact path: entries as floats, multiplied or written out.
#pragma once

#include "tiles.h"

namespace {

// Calls take(column, entries) for all lanes of one row, from left to right.
template <class Isa, int P, class Take>
void each_entry(const SlabSymbols& weight, const Alphabet& alphabet, const TileReader<P>& reader, const float* right,
                const int64_t* groups, int64_t tiles, int64_t row, const Take& take) {
    const uint16_t* scales = weight.scales + row * groups_of(weight);
    const float u = half_at(weight.left, row);
    for (int64_t t = 0; t < tiles; ++t) {
        const auto symbols = load_row<Isa, P>(reader.tile(t), row % kTileRows);
        typename Isa::Entries table;
        UNROLLED for (int64_t h = 0; h < kChunks; ++h) {
            if (h % 2 == 0) {
                const float s = half_at(scales, groups[2 * t + h / 2]);
                table = Isa::entries(alphabet.level, alphabet.background, s, u);
            }
            const auto index = Isa::template index<P>(symbols, h);
            UNROLLED for (int64_t i = 0; i < kChunk / Isa::kLanes; ++i) {
                const int64_t column = t * kTileColumns + h * kChunk + i * Isa::kLanes;
                take(column, Isa::template entry<P>(table, index, i, Isa::load(right + column)));
            }
        }
    }
}

template <class Isa, int P, int T>
void exact_symbol_rows(const SlabSymbols& weight, const SymbolActivations& act, const Output& output, int64_t begin,
                       int64_t end) {
    const Alphabet alphabet(weight);
    const int64_t padded = act.tiles * kTileColumns;
    for (int64_t four = begin; four < end; four += kTileRows) {
        const TileReader<P> reader(weight, four);
        for (int64_t row = four; row < end && row < four + kTileRows; ++row) {
            typename Isa::Floats sum[T];
            for (int t = 0; t < T; ++t) sum[t] = Isa::zero();
            each_entry<Isa>(weight, alphabet, reader, act.right, act.groups, act.tiles, row,
                            [&](int64_t column, const typename Isa::Floats& entries) {
                                for (int t = 0; t < T; ++t) {
                                    sum[t] = Isa::fma(entries, Isa::load(act.x + t * padded + column), sum[t]);
                                }
                            });
            for (int t = 0; t < T; ++t) store(output, weight.rows, row, t, Isa::total(sum[t]));
        }
    }
}

template <class Isa, int P, class Out>
void unpack_symbol_rows(const SlabSymbols& weight, int64_t begin, int64_t end, Out* output) {
    const Alphabet alphabet(weight);
    const int64_t n = weight.columns, lanes = Isa::kLanes;
    for (int64_t four = begin; four < end; four += kTileRows) {
        const TileReader<P> reader(weight, four);
        for (int64_t row = four; row < end && row < four + kTileRows; ++row, output += n) {
            const uint16_t* scales = weight.scales + row * groups_of(weight);
            const float u = half_at(weight.left, row);
            for (int64_t start = 0; start < n; start += kChunk) {
                const auto symbols = load_row<Isa, P>(reader.tile(start / kTileColumns), row % kTileRows);
                const float s = half_at(scales, start / weight.group_size);
                const auto table = Isa::entries(alphabet.level, alphabet.background, s, u);
                float v[kChunk];
                const int64_t left = n - start < kChunk ? n - start : kChunk;
                to_floats(reinterpret_cast<const Half*>(weight.right) + start, left, kChunk, v);
                Out chunk[kChunk];
                const auto index = Isa::template index<P>(symbols, start % kTileColumns / kChunk);
                UNROLLED for (int64_t i = 0; i < kChunk / Isa::kLanes; ++i) {
                    Isa::save(Isa::template entry<P>(table, index, i, Isa::load(v + i * lanes)), chunk + i * lanes);
                }
                memcpy(output + start, chunk, sizeof(Out) * static_cast<size_t>(left));
            }
        }
    }
}

}  // namespace
