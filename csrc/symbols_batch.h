// Weights in symbols and many tokens: four rows become bytes once, and these are multiplied with all tokens in fixed point.
//
// An input is one signed byte (8 bits), or two planes of bytes as for one token (14 bits). A token's inputs have one scale per
// segment of columns. Where they are rotated, outliers are spread and a segment is long; else it is a tile, so that an
// outlier costs few others their digits.
//
// Isa offers, beside what symbols.h names:
//   kBatchTokens                      of one plane, tokens that are multiplied together; 0 where floats are faster
//   save(Bytes, uint8_t*), bytes(const uint8_t*)
//   BatchSums<N, Planes>              N sums: start(i, int32_t[kLanes]), add(i, Bytes, x), floats(i)
//   arrange<Planes>(fixed, x)         a chunk of inputs as they read it
#pragma once

#include "symbols_inputs.h"
#include "tiles.h"

namespace {

// Inputs of a block of tokens stay in the second level of the cache, while rows go by.
constexpr int64_t kBlockBytes = 256 << 10;

constexpr float largest_of(int64_t planes) { return planes == 1 ? 127.0f : kLargest; }

// Where sums of products start: -127.5 times the inputs. A lane of one plane may lose half a unit.
template <class Isa, int Planes>
void save_batch_starts(const int8_t* x, int64_t count, int32_t* starts) {
    const int32_t none[Isa::kLanes] = {};
    typename Isa::template BatchSums<1, Planes> sums;
    sums.start(0, none);
    for (int64_t at = 0; at < count; at += Isa::kChunk) sums.add(0, Isa::all(255), x + at * Planes);
    sums.save(0, starts);
    for (int64_t lane = 0; lane < Isa::kLanes; ++lane) starts[lane] /= -2;
}

template <class Isa, int Planes>
bool prepare_planes(int64_t token, const float* x, const BatchActivations& act) {
    bool finite = true;
    for (int64_t s = 0; s < act.segments; ++s) {
        const int64_t first = s * act.segment, end = first + act.segment < act.padded ? first + act.segment : act.padded;
        const float unit = fixed_unit(x + first, end - first, largest_of(Planes));
        act.scales[token * act.segments + s] = unit / (Planes * kSteps);
        finite &= is_finite(unit);
        int8_t* to = act.x + (token * act.padded + first) * Planes;
        for (int64_t h = 0; h < end - first; h += Isa::kChunk) {
            int16_t fixed[Isa::kChunk];
            to_fixed_point<Isa::kChunk>(x + first + h, unit, fixed);
            Isa::template arrange<Planes>(fixed, to + h * Planes);
        }
        save_batch_starts<Isa, Planes>(to, end - first, act.starts + (token * act.segments + s) * Isa::kLanes);
    }
    return finite;
}

// One token; `x` is room for it as floats. Returns whether it is finite.
template <class Isa>
bool prepare_batch(const SlabSymbols& weight, const void* inputs, int32_t input_type, int64_t token, float* x,
                   const BatchActivations& act) {
    const int64_t n = weight.columns;
    read_token(inputs, input_type, token * n, n, act.padded, x);
    if (weight.block != 0) rotate<Isa>(x, n, weight.block, weight.seed, false);
    if constexpr (Isa::kBatchTokens > 0) {
        return act.planes == 1 ? prepare_planes<Isa, 1>(token, x, act) : prepare_planes<Isa, 2>(token, x, act);
    }
    return false;
}

// Four rows as bytes, [chunks, 4, kChunk].
template <class Isa, int P>
void write_bytes(const SlabSymbols& weight, int64_t row, const typename Isa::Table& table, uint8_t* bytes) {
    constexpr int64_t kChunks = kTileColumns / Isa::kChunk;
    const TileReader<P> reader(weight, row);
    for (int64_t t = 0; t < tiles_of(weight); ++t) {
        const uint8_t* tile = reader.tile(t);
        if (t < reader.whole) reader.fetch(t);
        UNROLLED for (int64_t h = 0; h < kChunks; ++h) {
            auto above = Isa::template index<P>(load_row<Isa, P>(tile, row_above(0)), h);
            UNROLLED for (int64_t r = 0; r < kTileRows; ++r) {
                const auto own = Isa::template index<P>(load_row<Isa, P>(tile, r), h);
                Isa::save(Isa::template look_up<P>(table, above, own), bytes + ((t * kChunks + h) * kTileRows + r) * Isa::kChunk);
                above = own;
            }
        }
    }
}

// Four rows, with their scales, of a tile.
struct FourRows {
    const uint8_t* bytes;
    int64_t row, end;  // those before `end` are stored
    float scales[kTileRows];

    FourRows(const SlabSymbols& weight, const uint8_t* bytes, int64_t row, int64_t end) : bytes(bytes), row(row), end(end) {
        for (int64_t r = 0; r < kTileRows; ++r) scales[r] = row + r < end ? scale_of(weight, row + r) : 0.0f;
    }

    // Of one token: in the outputs, they follow each other.
    void store_sums(const float* sums, const Output& output, int64_t rows, int64_t token) const {
        float values[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r) values[r] = scales[r] * sums[r];
        if (output.type == kFloat32 && row + kTileRows <= end && token < output.tokens) {
            memcpy(static_cast<float*>(output.data) + token * rows + row, values, sizeof values);
            return;
        }
        for (int64_t r = 0; r < kTileRows && row + r < end; ++r) store(output, rows, row + r, token, values[r]);
    }
};

// T tokens from `token` on.
template <class Isa, int Planes, int T>
void batch_rows(const SlabSymbols& weight, const FourRows& four, const BatchActivations& act, const Output& output,
                int64_t token) {
    constexpr int R = kTileRows;
    typename Isa::Floats sums[R * T];
    const int64_t used = (weight.columns + Isa::kChunk - 1) / Isa::kChunk * Isa::kChunk;
    for (int64_t s = 0; s < act.segments; ++s) {
        const int64_t first = s * act.segment, last = first + act.segment < used ? first + act.segment : used;
        typename Isa::template BatchSums<R * T, Planes> products;
        UNROLLED for (int t = 0; t < T; ++t) {
            const int32_t* starts = act.starts + ((token + t) * act.segments + s) * Isa::kLanes;
            UNROLLED for (int r = 0; r < R; ++r) products.start(t * R + r, starts);
        }
        for (int64_t column = first; column < last; column += Isa::kChunk) {
            typename Isa::Bytes u[R];
            UNROLLED for (int r = 0; r < R; ++r) u[r] = Isa::bytes(four.bytes + column * R + r * Isa::kChunk);
            UNROLLED for (int t = 0; t < T; ++t) {
                const int8_t* x = act.x + ((token + t) * act.padded + column) * Planes;
                UNROLLED for (int r = 0; r < R; ++r) products.add(t * R + r, u[r], x);
            }
        }
        UNROLLED for (int t = 0; t < T; ++t) {
            const auto scale = Isa::broadcast(act.scales[(token + t) * act.segments + s]);
            UNROLLED for (int r = 0; r < R; ++r) {
                auto& sum = sums[t * R + r];
                const auto product = products.floats(t * R + r);
                sum = s == 0 ? Isa::mul(scale, product) : Isa::fma(scale, product, sum);
            }
        }
    }
    float totals[R * T];
    Isa::totals(sums, totals);
    for (int t = 0; t < T; ++t) four.store_sums(totals + t * R, output, weight.rows, token + t);
}

template <class Isa, int P, int Planes>
void batch_range(const SlabSymbols& weight, const BatchActivations& act, const Output& output, int64_t begin, int64_t end,
                 uint8_t* bytes) {
    constexpr int T = Isa::kBatchTokens / Planes;
    const int64_t fitting = kBlockBytes / (Planes * act.padded) / T * T, block = fitting > T ? fitting : T;
    const auto table = Isa::template table<P>(Levels(weight));
    for (int64_t first = 0; first < act.tokens; first += block) {
        const int64_t last = first + block < act.tokens ? first + block : act.tokens;
        for (int64_t row = begin; row < end; row += kTileRows) {
            write_bytes<Isa, P>(weight, row, table, bytes);
            const FourRows four(weight, bytes, row, end);
            for (int64_t t = first; t < last; t += T) batch_rows<Isa, Planes, T>(weight, four, act, output, t);
        }
    }
}

// Rows [begin, end), of which the first is that of a tile. `bytes` is room for four rows.
template <class Isa>
void batch_symbols(const SlabSymbols& weight, const BatchActivations& act, const Output& output, int64_t begin,
                   int64_t end, uint8_t* bytes) {
    if constexpr (Isa::kBatchTokens > 0) {
        for_bits(weight, [&](auto bits) {
            constexpr int P = bits.value;
            if (act.planes == 1) return batch_range<Isa, P, 1>(weight, act, output, begin, end, bytes);
            batch_range<Isa, P, 2>(weight, act, output, begin, end, bytes);
        });
    }
}

}  // namespace
