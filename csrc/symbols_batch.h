// Weights in symbols and many tokens: 32 rows become bytes once, and these are multiplied with all tokens in fixed point.
//
// An input is one signed byte (8 bits), or two planes of bytes as for one token (14 bits). A token's inputs have one scale per
// segment of columns. Where they are rotated, outliers are spread and a segment is long; else it is a tile, so that an
// outlier costs few others their digits. Rows are in the lanes of a sum: each lane gets four bytes of its row, and all get
// the same four inputs, so that nothing has to be added across lanes.
//
// Isa offers, beside what symbols.h names:
//   kBatchTokens                      of one plane, tokens that are multiplied together; 0 where floats are faster
//   Words                             a lane for each of 16 rows: words(int32_t), four(x), add_products(sum, Bytes, four)
//   whole<Planes>(high, low)          floats of a sum
//   bytes(const uint8_t*), save_transposed(Bytes[16], uint8_t* to, stride)
//   arrange<Planes>(fixed, x)         a chunk of inputs as they read it
#pragma once

#include "symbols_inputs.h"
#include "tiles.h"

namespace {

// Inputs of a block of tokens stay in the second level of the cache, while rows go by.
constexpr int64_t kBlockBytes = 256 << 10;

constexpr float largest_of(int64_t planes) { return planes == 1 ? 127.0f : kLargest; }

template <class Isa, int Planes>
bool prepare_planes(int64_t token, const float* x, const BatchActivations& act) {
    bool finite = true;
    for (int64_t s = 0; s < act.segments; ++s) {
        const int64_t first = s * act.segment, end = first + act.segment < act.padded ? first + act.segment : act.padded;
        const float unit = fixed_unit(x + first, end - first, largest_of(Planes));
        act.scales[token * act.segments + s] = unit / (Planes * kSteps);
        finite &= is_finite(unit);
        int8_t* to = act.x + (token * act.padded + first) * Planes;
        int32_t sums[kMostLanes] = {};
        for (int64_t h = 0; h < end - first; h += Isa::kChunk) {
            int16_t fixed[Isa::kChunk];
            to_fixed_point<Isa::kChunk>(x + first + h, unit, fixed);
            for (int64_t k = 0; k < Isa::kChunk; k += kMostLanes) {
                for (int64_t i = 0; i < kMostLanes; ++i) sums[i] += fixed[k + i];
            }
            Isa::template arrange<Planes>(fixed, to + h * Planes);
        }
        int32_t sum = 0;
        for (const int32_t lane : sums) sum += lane;
        // -127.5 times the inputs, of which two planes hold the double; one may lose half a unit.
        act.starts[token * act.segments + s] = Planes == 2 ? -255 * sum : -255 * sum / 2;
    }
    return finite;
}

// Tokens [begin, end); `room` is for twice a token's floats. Returns whether they are finite.
template <class Isa>
bool prepare_batch(const SlabSymbols& weight, const void* inputs, int32_t input_type, int64_t begin, int64_t end,
                   float* room, const BatchActivations& act) {
    const int64_t n = weight.columns;
    float *x = room, *signs = room + act.padded;
    bool finite = true;
    if constexpr (Isa::kBatchTokens > 0) {
        for (int64_t j = 0; j < n; ++j) signs[j] = 1.0f;
        if (weight.block != 0) turn_signs(signs, n, weight.seed);
        for (int64_t token = begin; token < end; ++token) {
            read_token(inputs, input_type, token * n, n, act.padded, x);
            if (weight.block != 0) {
                for (int64_t j = 0; j < n; ++j) x[j] *= signs[j];
                transform<Isa>(x, n, weight.block);
            }
            finite &= act.planes == 1 ? prepare_planes<Isa, 1>(token, x, act) : prepare_planes<Isa, 2>(token, x, act);
        }
    }
    return finite;
}

constexpr int64_t kVectorRows = 16;                     // rows in the lanes of a vector
constexpr int64_t kVectorsOfRows = kBatchRows / kVectorRows;
constexpr int64_t kTilesOfRows = kVectorRows / kTileRows;

inline int64_t chunks_of(const SlabSymbols& weight, int64_t chunk) { return (weight.columns + chunk - 1) / chunk; }

// Rows [row, row + 16) as bytes: four columns of all rows, then the next four. Behind the last row, it is repeated.
template <class Isa, int P>
void write_bytes(const SlabSymbols& weight, int64_t row, const typename Isa::Table& table, uint8_t* bytes) {
    constexpr int64_t kChunks = kTileColumns / Isa::kChunk;
    const int64_t last = (weight.rows - 1) / kTileRows * kTileRows;
    const auto at = [&](int64_t q) { return row + q * kTileRows < last ? row + q * kTileRows : last; };
    const TileReader<P> readers[kTilesOfRows] = {{weight, at(0)}, {weight, at(1)}, {weight, at(2)}, {weight, at(3)}};
    const int64_t chunks = chunks_of(weight, Isa::kChunk);
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t t = c / kChunks, h = c % kChunks;
        typename Isa::Bytes rows[kVectorRows];
        UNROLLED for (int64_t q = 0; q < kTilesOfRows; ++q) {
            const uint8_t* tile = readers[q].tile(t);
            if (h == 0 && t < readers[q].whole) readers[q].fetch(t);
            auto above = Isa::template index<P>(load_row<Isa, P>(tile, row_above(0)), h);
            UNROLLED for (int64_t r = 0; r < kTileRows; ++r) {
                const auto own = Isa::template index<P>(load_row<Isa, P>(tile, r), h);
                rows[q * kTileRows + r] = Isa::template look_up<P>(table, above, own);
                above = own;
            }
        }
        Isa::save_transposed(rows, bytes + c * Isa::kChunk * kBatchRows, 4 * kBatchRows);
    }
}

// Rows, with their scales, as bytes.
struct RowGroup {
    const uint8_t* bytes;
    int64_t row, end;  // those before `end` are stored
    float scales[kBatchRows];

    RowGroup(const SlabSymbols& weight, const uint8_t* bytes, int64_t row, int64_t end) : bytes(bytes), row(row), end(end) {
        for (int64_t r = 0; r < kBatchRows; ++r) scales[r] = row + r < end ? scale_of(weight, row + r) : 0.0f;
    }

    // Vector v of a token: in the outputs, rows follow each other.
    template <class Isa>
    void save(typename Isa::Floats sums, int64_t v, const Output& output, int64_t rows, int64_t token) const {
        const auto values = Isa::mul(sums, Isa::load(scales + v * kVectorRows));
        const int64_t first = row + v * kVectorRows;
        if (token >= output.tokens || first >= end) return;
        if (output.type == kFloat32 && first + kVectorRows <= end) {
            return Isa::save(values, static_cast<float*>(output.data) + token * rows + first);
        }
        float lanes[kVectorRows];
        Isa::save(values, lanes);
        for (int64_t r = 0; r < kVectorRows && first + r < end; ++r) store(output, rows, first + r, token, lanes[r]);
    }
};

// T tokens from `token` on.
template <class Isa, int Planes, int T>
void batch_rows(const SlabSymbols& weight, const RowGroup& group, const BatchActivations& act, const Output& output,
                int64_t token) {
    constexpr int V = kVectorsOfRows;
    typename Isa::Floats sums[T * V];
    const int64_t used = chunks_of(weight, Isa::kChunk) * Isa::kChunk;
    for (int64_t s = 0; s < act.segments; ++s) {
        const int64_t first = s * act.segment, last = first + act.segment < used ? first + act.segment : used;
        typename Isa::Words high[Planes == 2 ? T * V : 1], low[T * V];  // without a second plane, nothing is high
        UNROLLED for (int t = 0; t < T; ++t) {
            const auto start = Isa::words(act.starts[(token + t) * act.segments + s]);
            UNROLLED for (int v = 0; v < V; ++v) {
                low[t * V + v] = start;
                if (Planes == 2) high[t * V + v] = Isa::words(0);
            }
        }
        for (int64_t column = first; column < last; column += Isa::kChunk) {
            const uint8_t* bytes = group.bytes + column * kBatchRows;
            const int8_t* inputs = act.x + (token * act.padded + column) * Planes;
            for (int64_t k = 0; k < Isa::kChunk; k += 4) {
                typename Isa::Bytes u[V];
                UNROLLED for (int v = 0; v < V; ++v) u[v] = Isa::bytes(bytes + k * kBatchRows + v * 4 * kVectorRows);
                UNROLLED for (int t = 0; t < T; ++t) {
                    const int8_t* x = inputs + t * act.padded * Planes + k;
                    const auto own = Isa::four(x + Isa::kChunk * (Planes - 1));
                    UNROLLED for (int v = 0; v < V; ++v) Isa::add_products(low[t * V + v], u[v], own);
                    if (Planes == 2) {
                        const auto above = Isa::four(x);
                        UNROLLED for (int v = 0; v < V; ++v) Isa::add_products(high[t * V + v], u[v], above);
                    }
                }
            }
        }
        UNROLLED for (int t = 0; t < T; ++t) {
            const auto scale = Isa::broadcast(act.scales[(token + t) * act.segments + s]);
            UNROLLED for (int v = 0; v < V; ++v) {
                const int i = t * V + v;
                const auto product = Isa::template whole<Planes>(high[Planes == 2 ? i : 0], low[i]);
                sums[i] = s == 0 ? Isa::mul(scale, product) : Isa::fma(scale, product, sums[i]);
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < V; ++v) group.save<Isa>(sums[t * V + v], v, output, weight.rows, token + t);
    }
}

template <class Isa, int P, int Planes>
void batch_range(const SlabSymbols& weight, const BatchActivations& act, const Output& output, int64_t begin, int64_t end,
                 uint8_t* bytes) {
    constexpr int T = Isa::kBatchTokens / Planes;
    const int64_t fitting = kBlockBytes / (Planes * act.padded) / T * T, block = fitting > T ? fitting : T;
    const auto table = Isa::template table<P>(Levels(weight));
    for (int64_t first = 0; first < act.tokens; first += block) {
        const int64_t last = first + block < act.tokens ? first + block : act.tokens;
        for (int64_t row = begin; row < end; row += kBatchRows) {
            for (int64_t v = 0; v < kVectorsOfRows; ++v) {
                write_bytes<Isa, P>(weight, row + v * kVectorRows, table, bytes + v * 4 * kVectorRows);
            }
            const RowGroup group(weight, bytes, row, end);
            for (int64_t t = first; t < last; t += T) batch_rows<Isa, Planes, T>(weight, group, act, output, t);
        }
    }
}

// Rows [begin, end), of which the first is that of a tile. `bytes` is room for kBatchRows of them.
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
