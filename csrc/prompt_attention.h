// Attention of many tokens: blocks of queries and keys, with a running maximum, so that scores never leave the cache.
//
// Keys of a block are transposed once for all heads and queries that share them. Then both products go through the same
// few registers: scores have keys in their lanes, sums of values have numbers of a head.
#pragma once

#include "attention.h"

namespace {

constexpr int64_t kKeysTogether = 4 * kMostLanes, kQueriesTogether = 6;
constexpr float kNoScore = -3.4e38f;

template <class Isa>
constexpr int kVectors = Isa::kLanes == 16 ? 4 : 2;

constexpr int64_t kPieceParts = 8;

inline int64_t piece_rows(int64_t count) { return (count + kQueriesTogether - 1) / kQueriesTogether * kQueriesTogether; }

// Numbers of the parts of a piece's memory, whole vectors each.
inline void piece_sizes(int64_t heads, int64_t count, int64_t d, int64_t (&sizes)[kPieceParts]) {
    const int64_t rows = piece_rows(count), all = heads * rows;
    const int64_t needed[kPieceParts] = {kKeysTogether * d, kKeysTogether * d, all * d, all * d,
                                         rows * kKeysTogether, all, all, rows};
    for (int64_t i = 0; i < kPieceParts; ++i) sizes[i] = (needed[i] + kMostLanes - 1) / kMostLanes * kMostLanes;
}

inline int64_t piece_numbers(int64_t heads, int64_t count, int64_t head_dim) {
    int64_t sizes[kPieceParts], sum = 0;
    piece_sizes(heads, count, head_dim, sizes);
    for (const int64_t size : sizes) sum += size;
    return sum;
}

struct PieceMemory {
    float *keys, *values, *queries, *outputs, *scores, *most, *sums, *factors;
    int64_t rows;  // of each head

    explicit PieceMemory(const AttentionPiece& piece) : rows(piece_rows(piece.count)) {
        int64_t sizes[kPieceParts];
        piece_sizes(piece.heads, piece.count, piece.head_dim, sizes);
        float** const parts[kPieceParts] = {&keys, &values, &queries, &outputs, &scores, &most, &sums, &factors};
        float* next = piece.memory;
        for (int64_t i = 0; i < kPieceParts; ++i) {
            *parts[i] = next;
            next += sizes[i];
        }
    }
};

// Q rows of left times V vectors of right, [depth, stride], on top of what is in the sums.
template <class Isa, int Q, int V>
void multiply_rows(const float* left, int64_t left_stride, const float* right, int64_t stride, int64_t depth,
                   typename Isa::Floats (&sums)[Q * V]) {
    for (int64_t i = 0; i < depth; ++i) {
        typename Isa::Floats vectors[V];
        UNROLLED for (int v = 0; v < V; ++v) vectors[v] = Isa::load(right + i * stride + v * Isa::kLanes);
        UNROLLED for (int q = 0; q < Q; ++q) {
            const auto factor = Isa::broadcast(left[q * left_stride + i]);
            UNROLLED for (int v = 0; v < V; ++v) sums[q * V + v] = Isa::fma(factor, vectors[v], sums[q * V + v]);
        }
    }
}

template <class Isa>
void score_rows(const float* queries, const float* keys, int64_t d, float* scores) {
    constexpr int Q = kQueriesTogether, V = kVectors<Isa>;
    for (int64_t at = 0; at < kKeysTogether; at += V * Isa::kLanes) {
        typename Isa::Floats sums[Q * V];
        UNROLLED for (auto& sum : sums) sum = Isa::zero();
        multiply_rows<Isa, Q, V>(queries, d, keys + at, kKeysTogether, d, sums);
        for (int q = 0; q < Q; ++q) {
            for (int v = 0; v < V; ++v) Isa::save(sums[q * V + v], scores + q * kKeysTogether + at + v * Isa::kLanes);
        }
    }
}

// outputs = factors * outputs + weights * values, for V vectors from dimension `at` on.
template <class Isa, int V>
void mix_rows(const float* weights, const float* factors, const float* values, int64_t d, int64_t at, float* outputs) {
    constexpr int Q = kQueriesTogether;
    typename Isa::Floats sums[Q * V];
    for (int q = 0; q < Q; ++q) {
        const auto factor = Isa::broadcast(factors[q]);
        for (int v = 0; v < V; ++v) sums[q * V + v] = Isa::mul(factor, Isa::load(outputs + q * d + at + v * Isa::kLanes));
    }
    multiply_rows<Isa, Q, V>(weights, kKeysTogether, values + at, d, kKeysTogether, sums);
    for (int q = 0; q < Q; ++q) {
        for (int v = 0; v < V; ++v) Isa::save(sums[q * V + v], outputs + q * d + at + v * Isa::kLanes);
    }
}

// All lanes of a vector into one, by halves: one after the other they would wait for each other.
template <class Combine>
float folded(float (&lanes)[kMostLanes], const Combine& combine) {
    UNROLLED for (int64_t half = kMostLanes / 2; half > 0; half /= 2) {
        UNROLLED for (int64_t i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
    }
    return lanes[0];
}

// Scores become weights; returns their sum, sets the maximum so far, and the factor of what was summed before.
inline float weigh_row(float* scores, float& most, float& factor) {
    const auto larger = [](float a, float b) { return a > b ? a : b; };
    float largest[kMostLanes], sums[kMostLanes];
    for (int64_t i = 0; i < kMostLanes; ++i) {
        const float one = larger(scores[i], scores[kMostLanes + i]);
        largest[i] = larger(one, larger(scores[2 * kMostLanes + i], scores[3 * kMostLanes + i]));
    }
    const float before = most;
    most = larger(folded(largest, larger), before);
    factor = exponential(before - most);
    for (int64_t k = 0; k < kKeysTogether; ++k) {
        const float weight = exponential(scores[k] - most);
        scores[k] = scores[k] == kNoScore ? 0.0f : weight;
    }
    for (int64_t i = 0; i < kMostLanes; ++i) {
        sums[i] = (scores[i] + scores[kMostLanes + i]) + (scores[2 * kMostLanes + i] + scores[3 * kMostLanes + i]);
    }
    return folded(sums, [](float a, float b) { return a + b; });
}

// Scores of a query and the keys from `key` on that it must not see.
inline void hide(const AttentionPiece& piece, int64_t query, int64_t key, float* scores) {
    const int64_t there = piece.length - key < kKeysTogether ? piece.length - key : kKeysTogether;
    const int64_t seen = piece.mask != nullptr ? there : query + 1 - key < there ? query + 1 - key : there;
    for (int64_t k = seen < 0 ? 0 : seen; k < kKeysTogether; ++k) scores[k] = kNoScore;
    if (piece.mask == nullptr) return;
    const uint8_t* mask = piece.mask + query * piece.length + key;
    for (int64_t k = 0; k < there; ++k) scores[k] = mask[k] != 0 ? scores[k] : kNoScore;
}

// Keys [length, d] from `key` on, transposed, and their values; what is behind the last one is 0.
template <class Isa, class Value>
void read_keys(const AttentionPiece& piece, int64_t key, const PieceMemory& memory) {
    const int64_t d = piece.head_dim;
    const Value* keys = static_cast<const Value*>(piece.keys) + key * d;
    const Value* values = static_cast<const Value*>(piece.values) + key * d;
    for (int64_t k = 0; k < kKeysTogether; ++k) {
        const bool there = key + k < piece.length;
        for (int64_t i = 0; i < d; i += Isa::kLanes) {
            float row[Isa::kLanes];
            Isa::save(there ? Isa::load(keys + k * d + i) : Isa::zero(), row);
            for (int64_t j = 0; j < Isa::kLanes; ++j) memory.keys[(i + j) * kKeysTogether + k] = row[j];
            Isa::save(there ? Isa::load(values + k * d + i) : Isa::zero(), memory.values + k * d + i);
        }
    }
}

// One head, with the keys from `key` on.
template <class Isa>
void attend_block(const AttentionPiece& piece, int64_t head, int64_t key, const PieceMemory& memory) {
    const int64_t d = piece.head_dim, first = head * memory.rows;
    for (int64_t q = 0; q < memory.rows; q += kQueriesTogether) {
        float* scores = memory.scores + q * kKeysTogether;
        score_rows<Isa>(memory.queries + (first + q) * d, memory.keys, d, scores);
    }
    for (int64_t q = 0; q < memory.rows; ++q) {
        float* scores = memory.scores + q * kKeysTogether;
        hide(piece, piece.first + (q < piece.count ? q : piece.count - 1), key, scores);
        float& sum = memory.sums[first + q];
        const float added = weigh_row(scores, memory.most[first + q], memory.factors[q]);
        sum = sum * memory.factors[q] + added;
    }
    for (int64_t q = 0; q < memory.rows; q += kQueriesTogether) {
        const float* weights = memory.scores + q * kKeysTogether;
        float* outputs = memory.outputs + (first + q) * d;
        int64_t at = 0;
        constexpr int64_t kStep = kVectors<Isa> * Isa::kLanes;
        for (; at + kStep <= d; at += kStep) mix_rows<Isa, kVectors<Isa>>(weights, memory.factors + q, memory.values, d, at, outputs);
        for (; at < d; at += Isa::kLanes) mix_rows<Isa, 1>(weights, memory.factors + q, memory.values, d, at, outputs);
    }
}

inline void begin_piece(const AttentionPiece& piece, const PieceMemory& memory) {
    const int64_t d = piece.head_dim, all = piece.heads * memory.rows;
    for (int64_t i = 0; i < all * d; ++i) memory.queries[i] = memory.outputs[i] = 0.0f;
    for (int64_t i = 0; i < all; ++i) memory.most[i] = kNoScore, memory.sums[i] = 0.0f;
    for (int64_t h = 0; h < piece.heads; ++h) {
        const float* from = piece.queries + h * piece.query_stride + piece.first * d;
        float* to = memory.queries + h * memory.rows * d;
        for (int64_t i = 0; i < piece.count * d; ++i) to[i] = from[i] * piece.scaling;
    }
}

inline void end_piece(const AttentionPiece& piece, const PieceMemory& memory) {
    const int64_t d = piece.head_dim;
    for (int64_t h = 0; h < piece.heads; ++h) {
        for (int64_t q = 0; q < piece.count; ++q) {
            const int64_t row = h * memory.rows + q;
            const float factor = memory.sums[row] == 0.0f ? 0.0f : 1.0f / memory.sums[row];
            float* to = piece.output + q * piece.output_stride + h * d;
            for (int64_t i = 0; i < d; ++i) to[i] = factor * memory.outputs[row * d + i];
        }
    }
}

// Keys that some query of the piece sees: [begin, end).
inline void seen_keys(const AttentionPiece& piece, int64_t& begin, int64_t& end) {
    begin = 0;
    end = piece.first + piece.count;
    if (piece.mask == nullptr) return;
    begin = piece.length;
    end = 0;
    for (int64_t q = piece.first; q < piece.first + piece.count; ++q) {
        const uint8_t* mask = piece.mask + q * piece.length;
        int64_t from = 0, to = piece.length;
        while (from < begin && mask[from] == 0) ++from;
        while (to > end && mask[to - 1] == 0) --to;
        begin = from < begin ? from : begin;
        end = to > end ? to : end;
    }
}

template <class Isa>
void attend_many(const AttentionPiece& piece) {
    const PieceMemory memory(piece);
    int64_t begin, end;
    seen_keys(piece, begin, end);
    begin_piece(piece, memory);
    for (int64_t key = begin / kKeysTogether * kKeysTogether; key < end; key += kKeysTogether) {
        if (piece.cache_type == kFloat32) read_keys<Isa, float>(piece, key, memory);
        else if (piece.cache_type == kFloat16) read_keys<Isa, Half>(piece, key, memory);
        else read_keys<Isa, BFloat>(piece, key, memory);
        for (int64_t head = 0; head < piece.heads; ++head) attend_block<Isa>(piece, head, key, memory);
    }
    end_piece(piece, memory);
}

}  // namespace
