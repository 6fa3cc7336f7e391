// Inputs for a weight in symbols, once per call: rotated, as floats, and in fixed point.
#pragma once

#include "rotation.h"
#include "tiles.h"

namespace {

inline bool all_finite(const float* x, int64_t count) {
    uint32_t top = 0;
    for (int64_t j = 0; j < count; ++j) {
        const uint32_t magnitude = as_bits(x[j]) & 0x7FFFFFFFu;
        top = magnitude > top ? magnitude : top;
    }
    return is_finite(as_float(top));
}

// Where sums of products with a tile's inputs start, in lanes: -127.5 times the inputs' own sums. The inputs are stored
// twice as large, so that these are integers.
template <class Isa>
void save_starts(const int16_t* x16, int32_t* starts) {
    for (int64_t lane = 0; lane < Isa::kLanes; ++lane) starts[lane] = 0;
    auto sums = Isa::start(starts);
    for (int64_t at = 0; at < kTileColumns; at += Isa::kChunk) sums = Isa::dot(sums, Isa::all(255), x16 + at);
    Isa::save(sums, starts);
    for (int64_t lane = 0; lane < Isa::kLanes; ++lane) starts[lane] /= -2;
}

// Returns whether fixed point can stand for the token.
template <class Isa>
bool prepare_quick(SymbolActivations& act, int64_t token) {
    bool finite = true;
    for (int64_t t = 0; t < act.tiles; ++t) {
        const int64_t tile = token * act.tiles + t, at = tile * kTileColumns;
        int16_t fixed[kTileColumns];
        const float unit = fixed_unit(act.x + at, kTileColumns);
        to_fixed_point<kTileColumns>(act.x + at, unit, fixed);
        act.x_scales[tile] = unit / (2 * kSteps);
        finite &= is_finite(act.x_scales[tile]);
        for (int64_t h = 0; h < kTileColumns; h += Isa::kChunk) Isa::arrange(fixed + h, act.x16 + at + h);
        save_starts<Isa>(act.x16 + at, act.starts + tile * Isa::kLanes);
    }
    return finite;
}

template <class Isa>
Suits prepare_symbols(const SlabSymbols& weight, const void* inputs, int32_t input_type, int64_t tokens, bool quick,
                      SymbolActivations& act) {
    const int64_t padded = act.tiles * kTileColumns, n = weight.columns;
    for (int64_t token = 0; token < act.tokens; ++token) {
        float* x = act.x + token * padded;
        read_token(inputs, input_type, token * n, token < tokens ? n : 0, padded, x);
        if (weight.block != 0) {
            rotate<Isa>(x, n, weight.block, weight.seed, false);
            if (!all_finite(x, n)) return Suits::kNeither;
        }
        quick = quick && prepare_quick<Isa>(act, token);
    }
    return quick ? Suits::kQuick : Suits::kExact;
}

}  // namespace
