// A weight in symbols as a file holds it (slablm/packing/symbols.py): tiles of rows, scales and entries by symbol.
#pragma once

#include "kernels.h"

namespace {

constexpr int64_t kChunk = 32;  // columns whose symbols are looked up together
constexpr int64_t kChunks = kTileColumns / kChunk;
constexpr int kTable = 32;
constexpr float kLargestLevel = 32767.0f;

template <int N>
struct Constant {
    static constexpr int value = N;
};

constexpr int low_bits(int bits) { return bits < 4 ? 2 : 4; }
constexpr int64_t tile_bytes(int bits) { return kTileRows * kTileColumns * bits / 8; }
// Bytes of a row of a tile in the low plane and in the top one.
constexpr int64_t low_stride(int bits) { return kTileColumns * low_bits(bits) / 8; }
constexpr int64_t kTopStride = kTileColumns / 8;

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
        if (P % 2 == 1) widen_plane<1>(half + kTileRows * low_stride(P) / 2, last + kTileRows * low_stride(P));
    }

    const uint8_t* tile(int64_t t) const { return t < whole ? first + t * tile_bytes(P) : last; }

    // Tiles follow each other, also from rows to rows: one stream, and the hardware only needs help at pages.
    void fetch(int64_t t) const {
        const uint8_t* ahead = first + t * tile_bytes(P) + kBytesAhead;
        for (int64_t line = 0; line < tile_bytes(P); line += 64) __builtin_prefetch(ahead + line);
    }
};

template <class Isa, int P>
typename Isa::Symbols load_row(const uint8_t* tile, int64_t r) {
    return Isa::template load<P>(tile + r * low_stride(P), tile + kTileRows * low_stride(P) + r * kTopStride);
}

inline float half_at(const uint16_t* halves, int64_t at) { return to_float(Half{halves[at]}); }

inline int64_t groups_of(const SlabSymbols& weight) {
    return (weight.columns + weight.group_size - 1) / weight.group_size;
}

// Entries by symbol, repeated: levels with their signs, 0 for the background, and the signs of the background.
struct Alphabet {
    float level[kTable], background[kTable];

    explicit Alphabet(const SlabSymbols& weight) {
        const int top = 1 << (weight.bits - 1);
        for (int k = 0; k < kTable; ++k) {
            const int c = k & (top - 1);
            const float sign = k & top ? -1.0f : 1.0f;
            level[k] = c == 0 ? 0.0f : sign * half_at(weight.levels, c - 1);
            background[k] = c == 0 ? sign : 0.0f;
        }
    }

    float largest() const {
        float top = 0.0f;
        for (float a : level) top = a > top ? a : top;
        return top;
    }
};

}  // namespace
