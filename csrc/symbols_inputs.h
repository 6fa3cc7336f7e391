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

inline void fill_groups(const SlabSymbols& weight, SymbolActivations& act) {
    const int64_t last = groups_of(weight) - 1;
    for (int64_t w = 0; w < 2 * act.tiles; ++w) {
        const int64_t group = w * kWordBits / weight.group_size;
        act.groups[w] = group < last ? group : last;
    }
}

// Returns whether fixed point can stand for the token.
template <class Isa>
bool prepare_quick(SymbolActivations& act, int64_t token, float level_unit) {
    const int64_t padded = act.tiles * kTileColumns;
    bool finite = true;
    for (int64_t t = 0; t < act.tiles; ++t) {
        const int64_t at = token * padded + t * kTileColumns, scale = token * act.tiles + t;
        const float *x = act.x + at, *v = act.right + t * kTileColumns;
        float z[kTileColumns];
        for (int64_t j = 0; j < kTileColumns; ++j) z[j] = v[j] * x[j];
        act.x_scales[scale] = to_fixed_point<kTileColumns>(x, Isa::group, act.x16 + at) * level_unit;
        act.z_scales[scale] = to_fixed_point<kTileColumns>(z, Isa::group, act.z16 + at) / Isa::kBackgroundUnit;
        finite &= is_finite(act.x_scales[scale]) && is_finite(act.z_scales[scale]);
    }
    return finite;
}

template <class Isa>
Suits prepare_symbols(const SlabSymbols& weight, const void* inputs, int32_t input_type, int64_t tokens, bool quick,
                      SymbolActivations& act) {
    const int64_t padded = act.tiles * kTileColumns, n = weight.columns;
    const float level_unit = Alphabet(weight).largest() / kLargestLevel;
    fill_groups(weight, act);
    to_floats(reinterpret_cast<const Half*>(weight.right), n, padded, act.right);
    for (int64_t token = 0; token < act.tokens; ++token) {
        float* x = act.x + token * padded;
        read_token(inputs, input_type, token * n, token < tokens ? n : 0, padded, x);
        if (weight.block != 0) {
            rotate<Isa>(x, n, weight.block, weight.seed, false);
            if (!all_finite(x, n)) return Suits::kNeither;
        }
        quick = quick && prepare_quick<Isa>(act, token, level_unit);
    }
    return quick ? Suits::kQuick : Suits::kExact;
}

}  // namespace
