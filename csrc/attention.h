// What a decoder block does between its products: norms, attention of one token, and the activation of the gate.
#pragma once

#include "kernels.h"

namespace {

// e^x to 2e-7, for all x that it has room for; what is below -87 counts as that. Adding 1.5 * 2^23 rounds to the nearest
// integer and leaves it in the low bits.
inline float exponential(float given) {
    constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f, kRounding = 12582912.0f;
    float x = given < -87.0f ? -87.0f : given;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * kLog2E + kRounding, n = shifted - kRounding;
    const float r = (x - n * kLn2High) - n * kLn2Low;
    float p = 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const float result = as_float(as_bits(p) + (as_bits(shifted) << 23));
    return given == given ? result : given;
}

template <class Isa>
float dot(const float* a, const float* b, int64_t count) {
    auto sum = Isa::zero();
    for (int64_t i = 0; i < count; i += Isa::kLanes) sum = Isa::fma(Isa::load(a + i), Isa::load(b + i), sum);
    return Isa::total(sum);
}

template <class Isa>
void normalize(float* x, int64_t count, const SlabNorm& norm) {
    if (norm.weight.data == nullptr) return;
    const float mean = dot<Isa>(x, x, count) / static_cast<float>(count);
    const float factor = 1.0f / __builtin_sqrtf(mean + static_cast<float>(norm.epsilon));
    const float offset = static_cast<float>(norm.offset);
    for (int64_t i = 0; i < count; ++i) x[i] = x[i] * factor * (offset + number(norm.weight, i));
}

// scores[t] = query . keys[t], four tokens at a time.
template <class Isa, class Value>
void score(const AttentionHead& head) {
    const int64_t d = head.head_dim;
    const Value* keys = static_cast<const Value*>(head.keys);
    for (int64_t t = 0; t < head.tokens; t += 4) {
        typename Isa::Floats sums[4];
        for (auto& sum : sums) sum = Isa::zero();
        for (int64_t i = 0; i < d; i += Isa::kLanes) {
            const auto query = Isa::load(head.query + i);
            UNROLLED for (int64_t k = 0; k < 4; ++k) {
                const int64_t token = t + k < head.tokens ? t + k : t;
                sums[k] = Isa::fma(query, Isa::load(keys + token * d + i), sums[k]);
            }
        }
        float totals[4];
        Isa::totals(sums, totals);
        memcpy(head.scores + t, totals, sizeof totals);
    }
}

// Scores become weights whose sum is returned; tokens behind the last one have none.
inline float weigh(const AttentionHead& head) {
    constexpr float kNone = -3.4e38f;
    float* scores = head.scores;
    const int64_t padded = (head.tokens + kMostLanes - 1) / kMostLanes * kMostLanes;
    for (int64_t t = head.tokens; t < padded; ++t) scores[t] = kNone;
    if (head.mask != nullptr) {
        for (int64_t t = 0; t < head.tokens; ++t) scores[t] = head.mask[t] != 0 ? scores[t] : kNone;
    }
    float most[kMostLanes], sums[kMostLanes] = {};
    for (float& value : most) value = kNone;
    for (int64_t t = 0; t < padded; t += kMostLanes) {
        for (int64_t i = 0; i < kMostLanes; ++i) most[i] = scores[t + i] > most[i] ? scores[t + i] : most[i];
    }
    float largest = kNone;
    for (const float value : most) largest = value > largest ? value : largest;
    for (int64_t t = 0; t < padded; t += kMostLanes) {
        for (int64_t i = 0; i < kMostLanes; ++i) {
            const float weight = exponential((scores[t + i] - largest) * head.scaling);
            scores[t + i] = scores[t + i] == kNone ? 0.0f : weight;
            sums[i] += scores[t + i];
        }
    }
    float sum = 0.0f;
    for (const float value : sums) sum += value;
    return sum;
}

// output = sum of weights and values over the tokens, for N vectors from dimension `at` on.
template <class Isa, class Value, int N>
void mix(const AttentionHead& head, float factor, int64_t at) {
    const Value* values = static_cast<const Value*>(head.values) + at;
    typename Isa::Floats sums[N];
    UNROLLED for (auto& sum : sums) sum = Isa::zero();
    for (int64_t t = 0; t < head.tokens; ++t, values += head.head_dim) {
        const auto weight = Isa::broadcast(head.scores[t]);
        UNROLLED for (int64_t i = 0; i < N; ++i) {
            sums[i] = Isa::fma(weight, Isa::load(values + i * Isa::kLanes), sums[i]);
        }
    }
    for (int64_t i = 0; i < N; ++i) {
        Isa::save(Isa::mul(sums[i], Isa::broadcast(factor)), head.output + at + i * Isa::kLanes);
    }
}

template <class Isa, class Value>
void attend_to(const AttentionHead& head) {
    score<Isa, Value>(head);
    const float factor = 1.0f / weigh(head);
    int64_t at = 0;
    for (; at + 4 * Isa::kLanes <= head.head_dim; at += 4 * Isa::kLanes) mix<Isa, Value, 4>(head, factor, at);
    for (; at < head.head_dim; at += Isa::kLanes) mix<Isa, Value, 1>(head, factor, at);
}

template <class Isa>
void attend(const AttentionHead& head) {
    if (head.cache_type == kFloat32) return attend_to<Isa, float>(head);
    if (head.cache_type == kFloat16) return attend_to<Isa, Half>(head);
    attend_to<Isa, BFloat>(head);
}

template <class Isa>
void activate(Activation activation, const float* gate, const float* up, float* out, int64_t count) {
    if (activation == kSilu) {
        for (int64_t i = 0; i < count; ++i) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
        return;
    }
    // x (1 + tanh(z)) / 2 = x / (1 + e^(-2z)), where z = sqrt(2 / pi) (x + 0.044715 x^3)
    for (int64_t i = 0; i < count; ++i) {
        const float x = gate[i], z = 0.797884561f * (x + 0.044715f * x * x * x);
        out[i] = x / (1.0f + exponential(-2.0f * z)) * up[i];
    }
}

}  // namespace
