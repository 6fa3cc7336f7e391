// The rotation of inputs (slablm/methods/rotation.py): signs from a seed, then a Hadamard transform of each block.
#pragma once

#include "kernels.h"

namespace {

inline uint64_t splitmix64(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

inline void turn_signs(float* x, int64_t columns, uint64_t seed) {
    for (int64_t j = 0; j < columns; ++j) {
        const uint32_t sign = static_cast<uint32_t>(splitmix64(seed, static_cast<uint64_t>(j)) >> 32) & 0x80000000u;
        x[j] = as_float(as_bits(x[j]) ^ sign);
    }
}

// Steps within a vector: p + q and p - q are both p' + sign * p, where p' is the other one of the pair.
template <class Isa>
void transform_lanes(float* x, int64_t columns, int64_t block, float factor) {
    float signs[4][Isa::kLanes];
    int steps = 0;
    for (int64_t s = 1; s < block && s < Isa::kLanes; s *= 2, ++steps) {
        for (int64_t i = 0; i < Isa::kLanes; ++i) signs[steps][i] = i & s ? -1.0f : 1.0f;
    }
    const auto scale = Isa::broadcast(factor);
    for (int64_t j = 0; j < columns; j += Isa::kLanes) {
        auto lanes = Isa::load(x + j);
        for (int step = 0; step < steps; ++step) {
            lanes = Isa::fma(lanes, Isa::load(signs[step]), Isa::swap(lanes, 1 << step));
        }
        Isa::save(Isa::mul(lanes, scale), x + j);
    }
}

// The Hadamard transform of each block, in place. `x` may be read and written up to a multiple of kLanes; what stands
// behind the columns must be 0.
template <class Isa>
void transform(float* x, int64_t columns, int64_t block) {
    transform_lanes<Isa>(x, columns, block, 1.0f / __builtin_sqrtf(static_cast<float>(block)));
    for (int64_t step = Isa::kLanes; step < block; step *= 2) {
        for (int64_t start = 0; start < columns; start += 2 * step) {
            for (int64_t j = start; j < start + step; j += Isa::kLanes) {
                const auto p = Isa::load(x + j), q = Isa::load(x + j + step);
                Isa::save(Isa::add(p, q), x + j);
                Isa::save(Isa::fma(q, Isa::broadcast(-1.0f), p), x + j + step);
            }
        }
    }
}

template <class Isa>
void rotate(float* x, int64_t columns, int64_t block, uint64_t seed, bool restore) {
    if (!restore) turn_signs(x, columns, seed);
    transform<Isa>(x, columns, block);
    if (restore) turn_signs(x, columns, seed);
}

}  // namespace
