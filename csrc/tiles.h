// A weight in symbols as a file holds it (slablm/packing/symbols.py): tiles of rows, levels and scales.
//
//   entry = s_i (u - 127.5) / 128,   u = q + 128 for the symbol's level q, or 255 - u where the symbol above is odd
//
// Above the first row of a tile is its last one.
#pragma once

#include "kernels.h"

namespace {

constexpr int kTable = 64;
constexpr float kMiddle = 127.5f;
constexpr float kSteps = 128.0f;

template <int N>
struct Constant {
    static constexpr int value = N;
};

// Calls run with the number of bits as a constant.
template <class Run>
void for_bits(const SlabSymbols& weight, const Run& run) {
    if (weight.bits == 2) return run(Constant<2>());
    if (weight.bits == 3) return run(Constant<3>());
    if (weight.bits == 4) return run(Constant<4>());
    if (weight.bits == 5) return run(Constant<5>());
    run(Constant<6>());
}

constexpr int low_bits(int bits) { return bits < 4 ? 2 : 4; }
constexpr int top_bits(int bits) { return bits - low_bits(bits); }
constexpr int64_t tile_bytes(int bits) { return kTileRows * kTileColumns * bits / 8; }
// Bytes of a row of a tile in the low plane and in the top one.
constexpr int64_t low_stride(int bits) { return kTileColumns * low_bits(bits) / 8; }
constexpr int64_t top_stride(int bits) { return kTileColumns * top_bits(bits) / 8; }

// One plane of Q bits of a tile of half the width, as that of a whole tile with symbols 0 in the second half: field f of
// byte k is column f * bytes + k, where a row of the whole tile has twice the bytes.
template <int Q>
void widen_plane(const uint8_t* half, uint8_t* whole) {
    constexpr int64_t kBytes = kWordBits * Q / 8;
    constexpr unsigned kMask = (1u << Q) - 1;
    for (int64_t r = 0; r < kTileRows; ++r) {
        for (int64_t k = 0; k < kBytes; ++k) {
            const unsigned byte = half[r * kBytes + k];
            unsigned even = 0, odd = 0;
            for (int f = 0; f < 4 / Q; ++f) {
                even |= (byte >> (2 * f * Q) & kMask) << (f * Q);
                odd |= (byte >> ((2 * f + 1) * Q) & kMask) << (f * Q);
            }
            whole[2 * r * kBytes + k] = static_cast<uint8_t>(even);
            whole[(2 * r + 1) * kBytes + k] = static_cast<uint8_t>(odd);
        }
    }
}

// Four rows of the weight, tile by tile.
template <int P>
struct TileReader {
    const uint8_t* first;
    int64_t whole;  // tiles of full width
    uint8_t last[tile_bytes(P)];

    TileReader(const SlabSymbols& weight, int64_t row) {
        const int64_t words = (weight.columns + kWordBits - 1) / kWordBits;
        first = weight.symbols + row * words * (kWordBits * P / 8);
        whole = words / 2;
        if (words % 2 == 0) return;
        const uint8_t* half = first + whole * tile_bytes(P);
        widen_plane<low_bits(P)>(half, last);
        constexpr int64_t kLow = kTileRows * low_stride(P);
        if constexpr (top_bits(P) > 0) widen_plane<top_bits(P)>(half + kLow / 2, last + kLow);
    }

    const uint8_t* tile(int64_t t) const { return t < whole ? first + t * tile_bytes(P) : last; }

    // Tiles follow each other, also from rows to rows: one stream, and the hardware only needs help at pages.
    void fetch(int64_t t) const {
        const uint8_t* ahead = first + t * tile_bytes(P) + kBytesAhead;
        for (int64_t line = 0; line < tile_bytes(P); line += 64) __builtin_prefetch(ahead + line);
    }
};

inline int64_t tiles_of(const SlabSymbols& weight) { return (weight.columns + kTileColumns - 1) / kTileColumns; }

constexpr int64_t row_above(int64_t r) { return (r + kTileRows - 1) % kTileRows; }

template <class Isa, int P>
typename Isa::Symbols load_row(const uint8_t* tile, int64_t r) {
    return Isa::template load<P>(tile + r * low_stride(P), tile + kTileRows * low_stride(P) + r * top_stride(P));
}

// u by symbol, repeated.
struct Levels {
    uint8_t byte[kTable];

    explicit Levels(const SlabSymbols& weight) {
        const int64_t last = (1 << weight.bits) - 1;
        for (int64_t k = 0; k < kTable; ++k) byte[k] = static_cast<uint8_t>(weight.levels[k & last] + 128);
    }
};

inline float scale_of(const SlabSymbols& weight, int64_t row) { return to_float(Half{weight.scales[row]}); }

}  // namespace
