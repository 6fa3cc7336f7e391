// A decoder block for many tokens: what comes before the cache gets them, and what comes behind.
//
// Rows, one per token, go through all of it in groups, so that its memory does not grow with the prompt.
#include <initializer_list>
#include <utility>

#include "blocks.h"

namespace {

constexpr int64_t kRowsTogether = 256;
constexpr int64_t kQueriesPerPiece = 48;

class PromptRun {
    const Kernels& kernels;
    const SlabBlock& block;
    const SlabPrompt& prompt;
    const int32_t threads;
    const int64_t rows = prompt.sequences * prompt.tokens, d = block.head_dim;
    const int64_t query_size = block.heads * d, key_size = block.kv_heads * d;
    const int64_t most = std::min(rows, kRowsTogether);

    // Memory for the rows that go together, of so many numbers each.
    void take(std::initializer_list<std::pair<float**, int64_t>> arrays) const {
        static thread_local Scratch memory;
        const auto whole = [&](int64_t size) { return (most * size + kMostLanes - 1) / kMostLanes * kMostLanes; };
        int64_t numbers = 0;
        for (const auto& array : arrays) numbers += whole(array.second);
        memory.start(4 * numbers);
        for (const auto& array : arrays) memory.take(whole(array.second), *array.first);
    }

    // work(row) for each of so many rows.
    template <class Work>
    void each(int64_t count, int64_t numbers, const Work& work) {
        for_rows(0, count, kWeightsPerInput * numbers, threads, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) work(row);
        });
    }

    int32_t product(const SlabProjection& projection, const float* inputs, int64_t count, float* outputs) {
        const int64_t size = projection.weight.rows;
        if (size == 0) return 0;
        const Output output{outputs, count, kFloat32};
        const int32_t status = multiply_many(kernels, projection.weight, inputs, kFloat32, count, prompt.input_bits, output, threads);
        if (status == 0 && projection.bias.data != nullptr) {
            each(count, size, [&](int64_t row) { add_bias(projection, outputs + row * size); });
        }
        return status;
    }

    void read_row(int64_t row, float* to) const {
        read_token(prompt.inputs, static_cast<int32_t>(prompt.type), row * block.hidden, block.hidden, block.hidden, to);
    }

    void turned(float* head, const SlabNorm& norm, int64_t sequence, int64_t token) const {
        kernels.normalize(head, d, norm);
        const SlabVector cosines{prompt.cosines, prompt.rotary_type}, sines{prompt.sines, prompt.rotary_type};
        turn(head, cosines, sines, prompt.rotary_dim, sequence * prompt.rotary_stride + token * prompt.rotary_dim);
    }

    // A row of products to its heads.
    void scatter(int64_t row, float* query, float* key, const float* value, void* keys, void* values) const {
        const int64_t s = row / prompt.tokens, t = row % prompt.tokens;
        for (int64_t h = 0; h < block.heads; ++h) {
            turned(query + h * d, block.query_norm, s, t);
            std::copy(query + h * d, query + (h + 1) * d, prompt.queries + ((s * block.heads + h) * prompt.tokens + t) * d);
        }
        for (int64_t h = 0; h < block.kv_heads; ++h) {
            turned(key + h * d, block.key_norm, s, t);
            const int64_t at = ((s * block.kv_heads + h) * prompt.tokens + t) * d;
            for (int64_t i = 0; i < d; ++i) {
                write(key[h * d + i], keys, prompt.type, at + i);
                write(value[h * d + i], values, prompt.type, at + i);
            }
        }
    }

    // Attention of rows [first, first + count), [count, heads * head_dim]. Returns whether there was memory for it.
    bool attend(const SlabContext& context, int64_t first, int64_t count, float* attended) {
        std::vector<AttentionPiece> pieces;
        const int64_t group = block.heads / block.kv_heads;
        for (int64_t row = first; row < first + count;) {
            const int64_t s = row / prompt.tokens, t = row % prompt.tokens;
            const int64_t queries = std::min({kQueriesPerPiece, prompt.tokens - t, first + count - row});
            for (int64_t h = 0; h < block.kv_heads; ++h) {
                const int64_t at = bytes_of(context.type) * (s * context.sequence_stride + h * context.head_stride);
                AttentionPiece piece{};
                piece.queries = prompt.queries + (s * block.heads + h * group) * prompt.tokens * d;
                piece.query_stride = prompt.tokens * d;
                piece.heads = group;
                piece.first = t;
                piece.count = queries;
                piece.keys = static_cast<const char*>(context.keys) + at;
                piece.values = static_cast<const char*>(context.values) + at;
                piece.cache_type = context.type;
                piece.length = context.length;
                piece.head_dim = d;
                piece.scaling = static_cast<float>(block.scaling);
                piece.mask = context.mask == nullptr ? nullptr : context.mask + s * context.mask_stride;
                piece.output = attended + (row - first) * query_size + h * group * d;
                piece.output_stride = query_size;
                pieces.push_back(piece);
            }
            row += queries;
        }
        const int64_t numbers = kernels.piece_numbers(group, kQueriesPerPiece, d), work = 2 * kQueriesPerPiece * group * d;
        return for_rows_with<float>(numbers, static_cast<int64_t>(pieces.size()), work * context.length, threads, 1,
                                    [&](float* memory, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                pieces[static_cast<size_t>(i)].memory = memory;
                kernels.attend_many(pieces[static_cast<size_t>(i)]);
            }
        });
    }

public:
    PromptRun(const Kernels& kernels, const SlabBlock& block, const SlabPrompt& prompt, int32_t threads)
        : kernels(kernels), block(block), prompt(prompt), threads(threads) {}

    int32_t heads(void* keys, void* values) {
        float *normed, *query, *key, *value;
        take({{&normed, block.hidden}, {&query, block.query.weight.rows}, {&key, key_size}, {&value, key_size}});
        const int64_t stride = block.query.weight.rows;
        const bool joined = block.key.weight.rows == 0;
        for (int64_t first = 0; first < rows; first += kRowsTogether) {
            const int64_t count = std::min(kRowsTogether, rows - first);
            each(count, block.hidden, [&](int64_t row) {
                read_row(first + row, normed + row * block.hidden);
                kernels.normalize(normed + row * block.hidden, block.hidden, block.attention_norm);
            });
            int32_t status = product(block.query, normed, count, query);
            if (status == 0) status = product(block.key, normed, count, key);
            if (status == 0) status = product(block.value, normed, count, value);
            if (status != 0) return status;
            each(count, query_size, [&](int64_t row) {
                float* own = query + row * stride;
                float* own_key = joined ? own + query_size : key + row * key_size;
                float* own_value = joined ? own + query_size + key_size : value + row * key_size;
                scatter(first + row, own, own_key, own_value, keys, values);
            });
        }
        return 0;
    }

    int32_t outputs(const SlabContext& context, void* outputs) {
        const int64_t hidden = block.hidden, size = block.intermediate, gate_size = block.gate.weight.rows;
        const bool joined = block.up.weight.rows == 0;
        float *residual, *normed, *made, *attended, *gate, *other;  // the last one is up's, or what is made of both
        take({{&residual, hidden}, {&normed, hidden}, {&made, hidden}, {&attended, query_size}, {&gate, gate_size}, {&other, size}});
        float* const activated = joined ? other : gate;
        for (int64_t first = 0; first < rows; first += kRowsTogether) {
            const int64_t count = std::min(kRowsTogether, rows - first);
            if (!attend(context, first, count, attended)) return -1;
            int32_t status = product(block.attention_out, attended, count, made);
            if (status != 0) return status;
            each(count, hidden, [&](int64_t row) {
                float *own = residual + row * hidden, *next = normed + row * hidden, *added = made + row * hidden;
                read_row(first + row, own);
                kernels.normalize(added, hidden, block.attention_out_norm);
                for (int64_t i = 0; i < hidden; ++i) next[i] = own[i] += added[i];
                kernels.normalize(next, hidden, block.mlp_norm);
            });
            status = product(block.gate, normed, count, gate);
            if (status == 0) status = product(block.up, normed, count, other);
            if (status != 0) return status;
            each(count, size, [&](int64_t row) {
                const float* own = gate + row * gate_size;
                const float* up = joined ? own + size : other + row * size;
                kernels.activate(block.activation, own, up, activated + row * size, size);
            });
            status = product(block.down, activated, count, made);
            if (status != 0) return status;
            each(count, hidden, [&](int64_t row) {
                float *own = residual + row * hidden, *added = made + row * hidden;
                kernels.normalize(added, hidden, block.mlp_out_norm);
                for (int64_t i = 0; i < hidden; ++i) write(own[i] + added[i], outputs, prompt.type, (first + row) * hidden + i);
            });
        }
        return 0;
    }
};

bool valid(const SlabPrompt& p, const SlabBlock& block) {
    return p.sequences > 0 && p.tokens > 0 && is_float(p.type) && is_float(p.rotary_type) && p.rotary_dim >= 0 &&
           p.rotary_dim % 2 == 0 && p.rotary_dim <= block.head_dim && (p.input_bits == 8 || p.input_bits == 14);
}

bool valid(const SlabContext& context, const SlabPrompt& prompt) {
    const bool long_enough = context.mask == nullptr ? context.length == prompt.tokens : context.length > 0;
    return is_float(context.type) && long_enough;
}

// The result of run(PromptRun) where it can be run.
template <class Run>
int32_t run_prompt(int32_t set, const SlabBlock* block, const SlabPrompt* prompt, int32_t threads, const Run& run) {
    const Kernels* kernels = kernels_of(set);
    if (kernels == nullptr || block == nullptr || prompt == nullptr || !valid(*block) || !valid(*prompt, *block)) return -1;
    if (kernels->batch_tokens == 0) return kNoKernel;
    try {
        PromptRun prompts(*kernels, *block, *prompt, threads);
        return run(prompts);
    } catch (const std::exception&) {
        return -1;
    }
}

}  // namespace

int32_t slablm_prompt_heads(int32_t set, const SlabBlock* block, const SlabPrompt* prompt, void* keys, void* values,
                            int32_t threads) {
    return run_prompt(set, block, prompt, threads, [&](PromptRun& run) { return run.heads(keys, values); });
}

int32_t slablm_prompt_outputs(int32_t set, const SlabBlock* block, const SlabPrompt* prompt, const SlabContext* context,
                              void* outputs, int32_t threads) {
    if (context == nullptr || prompt == nullptr || !valid(*context, *prompt)) return -1;
    return run_prompt(set, block, prompt, threads, [&](PromptRun& run) { return run.outputs(*context, outputs); });
}
