// Inputs of one call as the loops read them: number formats, float32, and fixed point with a scale per 64 columns.
//
// Included by kernels.h, once per translation unit, and in an unnamed namespace for the reason given there.
#pragma once

#include <string.h>

#include "slablm.h"

namespace {

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

inline int64_t padded_words(const SlabWeight& weight) { return (weight.columns + kWordBits - 1) / kWordBits; }

inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat value) { return as_float(uint32_t{value.bits} << 16); }

// The exponent is moved by a multiplication, which is exact and handles subnormals; infinities and NaN are put back.
inline float to_float(Half value) {
    const uint32_t magnitude = value.bits & 0x7FFFu;
    const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
    uint32_t bits = as_bits(as_float(magnitude << 13) * as_float(0x77800000u));
    if (magnitude >= 0x7C00u) bits = 0x7F800000u | magnitude << 13;
    return as_float(bits | sign);
}

inline void from_float(float value, float* out) { *out = value; }

// Round to nearest, ties to even.
inline void from_float(float value, BFloat* out) {
    const uint32_t bits = as_bits(value);
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    out->bits = static_cast<uint16_t>(nan ? bits >> 16 | 0x40u : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

inline void from_float(float value, Half* out) {
    const uint32_t sign = as_bits(value) >> 16 & 0x8000u;
    uint32_t bits = as_bits(value) & 0x7FFFFFFFu;
    if (bits > 0x7F800000u) {
        bits = 0x7E00u;  // NaN
    } else if (bits >= 0x477FF000u) {
        bits = 0x7C00u;  // rounds to infinity
    } else if (bits < 0x38800000u) {
        bits = as_bits(as_float(bits) + 0.5f) - 0x3F000000u;  // subnormal: the addition rounds
    } else {
        bits = (bits - 0x38000000u + 0xFFFu + (bits >> 13 & 1)) >> 13;
    }
    out->bits = static_cast<uint16_t>(bits | sign);
}

inline float number(const SlabVector& vector, int64_t i) {
    if (vector.type == kFloat32) return static_cast<const float*>(vector.data)[i];
    if (vector.type == kFloat16) return to_float(static_cast<const Half*>(vector.data)[i]);
    return to_float(static_cast<const BFloat*>(vector.data)[i]);
}

inline void write(float value, void* to, int64_t type, int64_t at) {
    if (type == kFloat32) from_float(value, static_cast<float*>(to) + at);
    if (type == kFloat16) from_float(value, static_cast<Half*>(to) + at);
    if (type == kBFloat16) from_float(value, static_cast<BFloat*>(to) + at);
}

template <class Input>
void to_floats(const Input* in, int64_t count, int64_t padded, float* out) {
    for (int64_t j = 0; j < count; ++j) out[j] = to_float(in[j]);
    for (int64_t j = count; j < padded; ++j) out[j] = 0.0f;
}

// `count` inputs from `offset` on, filled up with 0.
inline void read_token(const void* inputs, int32_t type, int64_t offset, int64_t count, int64_t padded, float* out) {
    if (type == kFloat32) to_floats(static_cast<const float*>(inputs) + offset, count, padded, out);
    if (type == kFloat16) to_floats(static_cast<const Half*>(inputs) + offset, count, padded, out);
    if (type == kBFloat16) to_floats(static_cast<const BFloat*>(inputs) + offset, count, padded, out);
}

// Fixed point has 14 bits: 8-bit weights are multiplied as 256 w (see `widen` in the units), and the sum of 8 products
// per lane, 8 * 256 * 127 * 8191, still fits into 32 bits.
constexpr float kLargest = 8191.0f;

// What a float is divided by: its largest magnitude becomes `to`. 0 stands for all of them being tiny, and it is not finite if one
// of them is not: as integers, magnitudes have the order of the floats, with NaN on top.
inline float fixed_unit(const float* x, int64_t count, float to = kLargest) {
    uint32_t top = 0;
    for (int64_t j = 0; j < count; ++j) {
        const uint32_t magnitude = as_bits(x[j]) & 0x7FFFFFFFu;
        top = magnitude > top ? magnitude : top;
    }
    const float largest = as_float(top);
    return largest < 1e-30f ? 0.0f : largest / to;
}

// Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits, in a form that compilers vectorize.
template <int64_t kCount>
void to_fixed_point(const float* x, float unit, int16_t* out) {
    const float inverse = unit == 0.0f ? 0.0f : 1.0f / unit;
    for (int64_t j = 0; j < kCount; ++j) {
        out[j] = static_cast<int16_t>(as_bits(x[j] * inverse + 12582912.0f) & 0xFFFFu);
    }
}

// A word's inputs, groups of 8 in the instruction set's order. Returns the scale of dot products with plain integers.
template <class Isa>
float word_to_fixed_point(const float* x, int16_t* out) {
    const float unit = fixed_unit(x, kWordBits);
    int16_t fixed[kWordBits];
    to_fixed_point<kWordBits>(x, unit, fixed);
    for (int64_t g = 0; g < kWordBits / 8; ++g) memcpy(out + 8 * Isa::group(g), fixed + 8 * g, 8 * sizeof(int16_t));
    return unit / Isa::kUnit;
}

inline bool is_finite(float value) { return (as_bits(value) & 0x7FFFFFFFu) < 0x7F800000u; }

// Returns whether fixed point can stand for the inputs: it has no infinity and no NaN. Always true unless `quick`.
template <class Isa>
bool prepare(const SlabWeight& weight, const void* inputs, int32_t input_type, int64_t tokens, bool quick,
             Activations& act) {
    const int64_t words = padded_words(weight), padded = words * kWordBits, n = weight.columns;
    bool finite = true;
    for (int64_t t = 0; t < act.tokens; ++t) {
        float* x = act.x + t * padded;
        read_token(inputs, input_type, t * n, t < tokens ? n : 0, padded, x);
        if (!quick) continue;
        for (int64_t w = 0; w < words; ++w) {
            const float* block = x + w * kWordBits;
            act.x_scales[t * words + w] = word_to_fixed_point<Isa>(block, act.x16 + t * padded + w * kWordBits);
            finite &= is_finite(act.x_scales[t * words + w]);
            for (int64_t q = 0; q < weight.rank; ++q) {
                const float* v = weight.right + q * padded + w * kWordBits;
                const int64_t qt = q * act.tokens + t;
                float z[kWordBits];
                for (int64_t j = 0; j < kWordBits; ++j) z[j] = v[j] * block[j];
                act.z_scales[qt * words + w] = word_to_fixed_point<Isa>(z, act.z16 + qt * padded + w * kWordBits);
                finite &= is_finite(act.z_scales[qt * words + w]);
            }
        }
    }
    return finite;
}

}  // namespace
