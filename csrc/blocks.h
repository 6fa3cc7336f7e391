// What a block's run for one new token and its run for many share.
#pragma once

#include "activations.h"
#include "runtime.h"

namespace {

inline bool has_shape(const SlabProjection& projection, int64_t rows, int64_t columns) {
    const SlabSymbols& weight = projection.weight;
    return valid(&weight) && weight.rows == rows && weight.columns == columns;
}

// Two or three weights one below the other, or all in the first.
inline bool have_shapes(const SlabProjection& first, const SlabProjection* const (&others)[2], const int64_t (&rows)[3],
                        int64_t columns) {
    if (has_shape(first, rows[0] + rows[1] + rows[2], columns)) {
        return others[0]->weight.rows == 0 && (others[1] == nullptr || others[1]->weight.rows == 0);
    }
    return has_shape(first, rows[0], columns) && has_shape(*others[0], rows[1], columns) &&
           (others[1] == nullptr || has_shape(*others[1], rows[2], columns));
}

inline bool valid(const SlabBlock& b) {
    const bool sizes = b.hidden > 0 && b.intermediate > 0 && b.head_dim > 0 && b.hidden % kMostLanes == 0 &&
                       b.intermediate % kMostLanes == 0 && b.head_dim % kMostLanes == 0 && b.kv_heads > 0 &&
                       b.heads % b.kv_heads == 0 && (b.activation == kSilu || b.activation == kGeluTanh);
    if (!sizes) return false;
    const int64_t queries = b.heads * b.head_dim, keys = b.kv_heads * b.head_dim;
    return have_shapes(b.query, {&b.key, &b.value}, {queries, keys, keys}, b.hidden) &&
           have_shapes(b.gate, {&b.up, nullptr}, {b.intermediate, b.intermediate, 0}, b.hidden) &&
           has_shape(b.attention_out, b.hidden, queries) && has_shape(b.down, b.hidden, b.intermediate);
}

inline bool is_float(int64_t type) { return type >= kFloat32 && type <= kBFloat16; }

// Rotary position embedding of a head: numbers i and i + half are turned together, by the angles from `at` on.
inline void turn(float* head, const SlabVector& cosines, const SlabVector& sines, int64_t dimensions, int64_t at) {
    const int64_t half = dimensions / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float low = head[i], high = head[i + half];
        head[i] = low * number(cosines, at + i) - high * number(sines, at + i);
        head[i + half] = high * number(cosines, at + half + i) + low * number(sines, at + half + i);
    }
}

inline void add_bias(const SlabProjection& projection, float* outputs) {
    if (projection.bias.data == nullptr) return;
    for (int64_t i = 0; i < projection.weight.rows; ++i) outputs[i] += number(projection.bias, i);
}

}  // namespace
