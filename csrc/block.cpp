// Decoder blocks for one new token of each of a few sequences, in one call.
//
// Threads are woken once. One of them leads: it prepares the inputs of a product by itself, which takes a microsecond or
// two, and hands out the product's rows. The others look for work until the last block is done. The leader waits for work
// that somebody has begun and for nobody who has not come: a thread whose core is busy elsewhere is not missed.
#include <array>
#include <memory>

#include "blocks.h"

namespace {

#if defined(__x86_64__)
inline void breathe() { __builtin_ia32_pause(); }
#else
inline void breathe() {}
#endif

template <class Condition>
void spin_until(const Condition& condition) {
    constexpr int kPatience = 4096;
    for (int i = 0; !condition(); ++i) {
        if (i < kPatience) {
            breathe();
        } else {
            std::this_thread::yield();
        }
    }
}

constexpr int64_t kPhases = 5;  // of a block: q k v, attention, o, gate and up, down

class Team {
    struct alignas(64) Phase {
        std::atomic<int64_t> next{0}, done{0};
        int64_t pieces = 0;
        void (*run)(const void* work, int64_t piece) = nullptr;
        const void* work = nullptr;
    };
    const int64_t count;
    const std::unique_ptr<Phase[]> phases;
    alignas(64) std::atomic<int64_t> begun{0};
    std::atomic<bool> led{false}, over{false};

    static void take_pieces(Phase& phase) {
        for (int64_t piece; (piece = phase.next.fetch_add(1, std::memory_order_relaxed)) < phase.pieces;) {
            phase.run(phase.work, piece);
            phase.done.fetch_add(1, std::memory_order_release);
        }
    }

    void follow() {
        for (int64_t k = 0; k < count; ++k) {
            spin_until([&] { return begun.load(std::memory_order_acquire) > k || over.load(std::memory_order_acquire); });
            if (begun.load(std::memory_order_acquire) <= k) return;
            take_pieces(phases[k]);
        }
    }

public:
    explicit Team(int64_t count) : count(count), phases(new Phase[static_cast<size_t>(count)]) {}

    // Calls work(piece) for all pieces, on whatever threads are there. For the leader.
    template <class Work>
    void share(int64_t pieces, const Work& work) {
        Phase& phase = phases[begun.load(std::memory_order_relaxed)];
        phase.pieces = pieces;
        phase.work = &work;
        phase.run = [](const void* given, int64_t piece) { (*static_cast<const Work*>(given))(piece); };
        begun.fetch_add(1, std::memory_order_release);
        take_pieces(phase);
        spin_until([&] { return phase.done.load(std::memory_order_acquire) == phase.pieces; });
    }

    // Runs lead() on one of so many threads.
    template <class Lead>
    void run(int64_t count, const Lead& lead) {
        static const GompParallel gomp_parallel = find_gomp_parallel();
        if (count == 1 || gomp_parallel == nullptr || forked) return lead();
        struct Call {
            Team& team;
            const Lead& lead;
        } call{*this, lead};
        const auto join = [](void* pointer) {
            auto& joined = *static_cast<Call*>(pointer);
            if (joined.team.led.exchange(true)) return joined.team.follow();
            joined.lead();
            joined.team.over.store(true, std::memory_order_release);
        };
        gomp_parallel(join, &call, static_cast<unsigned>(count), 0);
    }
};

// Floats of each token.
struct Rows {
    float* data;
    int64_t stride;

    float* operator[](int64_t token) const { return data + token * stride; }
    Rows from(int64_t offset) const { return {data + offset, stride}; }
};

class BlockRun {
    const Kernels& kernels;
    const SlabBlock& block;
    const SlabPlace& place;
    const SlabStep& step;
    Team& team;
    const int64_t tokens, padded_tokens, threads;
    const int64_t query_size = block.heads * block.head_dim, key_size = block.kv_heads * block.head_dim;
    const int64_t attended = place.slot + 1 - place.first;
    const int64_t score_stride = (attended + kMostLanes - 1) / kMostLanes * kMostLanes;
    Rows residual{};
    float *inputs = nullptr, *outputs[3] = {}, *scores = nullptr;  // of products; of attention
    SymbolActivations activations[3] = {};

    // Products of the same inputs, [tokens, columns] without gaps; `made[i]` are their outputs. Returns false where inputs
    // are not finite.
    template <size_t N>
    bool multiply(const SlabProjection* const (&projections)[N], Rows (&made)[N]) {
        int64_t pieces[N + 1] = {}, total = 0;
        Suits suits[N] = {};
        for (const auto* projection : projections) total += projection->weight.rows;
        const int64_t piece_rows = rows_per_piece(total, threads);
        for (size_t i = 0; i < N; ++i) {
            const SlabSymbols& weight = projections[i]->weight;
            made[i] = {outputs[i], weight.rows};
            pieces[i + 1] = pieces[i] + (weight.rows + piece_rows - 1) / piece_rows;
            if (weight.rows == 0) continue;
            suits[i] = prepare(weight, activations[i]);
            if (suits[i] == Suits::kNeither) return false;
        }
        team.share(pieces[N], [&](int64_t piece) {
            size_t i = 0;
            while (piece >= pieces[i + 1]) ++i;
            const SlabSymbols& weight = projections[i]->weight;
            const int64_t begin = (piece - pieces[i]) * piece_rows, end = std::min(begin + piece_rows, weight.rows);
            const auto run = suits[i] == Suits::kQuick ? kernels.quick_symbols : kernels.exact_symbols;
            run(weight, activations[i], Output{outputs[i], tokens, kFloat32}, begin, end);
        });
        for (size_t i = 0; i < N; ++i) {
            for (int64_t t = 0; t < tokens; ++t) add_bias(*projections[i], made[i][t]);
        }
        return true;
    }

    Suits prepare(const SlabSymbols& weight, SymbolActivations& act) const {
        act.tiles = (weight.columns + kTileColumns - 1) / kTileColumns;
        const bool quick = padded_tokens <= kernels.quick_symbol_tokens;
        return kernels.prepare_symbols(weight, inputs, kFloat32, tokens, quick, act);
    }

    void set_inputs(const SlabNorm& norm) {
        for (int64_t t = 0; t < tokens; ++t) {
            float* to = inputs + t * block.hidden;
            std::copy(residual[t], residual[t] + block.hidden, to);
            kernels.normalize(to, block.hidden, norm);
        }
    }

    void add_to_residual(const Rows& made, const SlabNorm& norm) {
        for (int64_t t = 0; t < tokens; ++t) {
            kernels.normalize(made[t], block.hidden, norm);
            for (int64_t i = 0; i < block.hidden; ++i) residual[t][i] += made[t][i];
        }
    }

    void turned(float* head, int64_t token) const {
        const SlabVector cosines{step.cosines, step.rotary_type}, sines{step.sines, step.rotary_type};
        turn(head, cosines, sines, step.rotary_dim, token * step.rotary_stride);
    }

    int64_t cache_offset(int64_t token, int64_t kv_head, int64_t position) const {
        return token * place.sequence_stride + kv_head * place.head_stride + position * block.head_dim;
    }

    void append_to_cache(const Rows& keys, const Rows& values) const {
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t h = 0; h < block.kv_heads; ++h) {
                float* key = keys[t] + h * block.head_dim;
                const float* value = values[t] + h * block.head_dim;
                kernels.normalize(key, block.head_dim, block.key_norm);
                turned(key, t);
                const int64_t at = cache_offset(t, h, place.slot);
                for (int64_t i = 0; i < block.head_dim; ++i) {
                    write(key[i], place.keys, place.type, at + i);
                    write(value[i], place.values, place.type, at + i);
                }
            }
        }
    }

    void attend(const Rows& queries, int64_t piece) {
        const int64_t t = piece / block.heads, h = piece % block.heads;
        float* query = queries[t] + h * block.head_dim;
        kernels.normalize(query, block.head_dim, block.query_norm);
        turned(query, t);
        const int64_t at = bytes_of(place.type) * cache_offset(t, h / (block.heads / block.kv_heads), place.first);
        AttentionHead head{};
        head.query = query;
        head.keys = static_cast<const char*>(place.keys) + at;
        head.values = static_cast<const char*>(place.values) + at;
        head.cache_type = place.type;
        head.tokens = attended;
        head.head_dim = block.head_dim;
        head.scaling = static_cast<float>(block.scaling);
        head.mask = step.mask == nullptr ? nullptr : step.mask + t * step.mask_stride;
        head.scores = scores + piece * score_stride;
        head.output = inputs + t * query_size + h * block.head_dim;
        kernels.attend(head);
    }

    bool attention() {
        Rows made[3], out[1];
        set_inputs(block.attention_norm);
        if (!multiply<3>({&block.query, &block.key, &block.value}, made)) return false;
        if (block.key.weight.rows == 0) made[1] = made[0].from(query_size);
        if (block.value.weight.rows == 0) made[2] = made[0].from(query_size + key_size);
        append_to_cache(made[1], made[2]);
        team.share(tokens * block.heads, [&](int64_t piece) { attend(made[0], piece); });
        if (!multiply<1>({&block.attention_out}, out)) return false;
        add_to_residual(out[0], block.attention_out_norm);
        return true;
    }

    bool mlp() {
        Rows made[2], out[1];
        set_inputs(block.mlp_norm);
        if (!multiply<2>({&block.gate, &block.up}, made)) return false;
        if (block.up.weight.rows == 0) made[1] = made[0].from(block.intermediate);
        for (int64_t t = 0; t < tokens; ++t) {
            kernels.activate(block.activation, made[0][t], made[1][t], inputs + t * block.intermediate, block.intermediate);
        }
        if (!multiply<1>({&block.down}, out)) return false;
        add_to_residual(out[0], block.mlp_out_norm);
        return true;
    }

    int64_t widest() const { return std::max({block.hidden, query_size, block.intermediate}); }

    // Floats of residual, inputs, outputs and scores.
    std::array<int64_t, 6> sizes() const {
        const int64_t tallest = std::max({block.hidden, block.query.weight.rows, block.gate.weight.rows});
        return {tokens * block.hidden, tokens * widest(), tokens * tallest,
                tokens * std::max(block.intermediate, key_size), tokens * key_size, tokens * block.heads * score_stride};
    }

    void take(Scratch& memory) {
        memory.start(bytes());
        for (int i = 0; i < 3; ++i) activations[i] = take_activations(memory, i == 0 ? widest() : block.hidden, padded_tokens);
        residual.stride = block.hidden;
        float** const arrays[] = {&residual.data, &inputs, &outputs[0], &outputs[1], &outputs[2], &scores};
        const auto counts = sizes();
        for (size_t i = 0; i < counts.size(); ++i) memory.take(counts[i], *arrays[i]);
    }

public:
    BlockRun(const Kernels& kernels, const SlabBlock& block, const SlabPlace& place, const SlabStep& step, Team& team,
             int64_t threads)
        : kernels(kernels), block(block), place(place), step(step), team(team), tokens(step.sequences),
          padded_tokens(next_power_of_two(tokens)), threads(threads) {}

    // Of memory.
    int64_t bytes() const {
        int64_t floats = 0;
        for (const int64_t size : sizes()) floats += size;
        return 4 * floats + activation_bytes(widest(), padded_tokens) + 2 * activation_bytes(block.hidden, padded_tokens);
    }

    // Returns whether all inputs of products were finite. Inputs and outputs are of the step's type.
    bool run(const void* from, void* to, Scratch& memory) {
        take(memory);
        const int64_t count = tokens * block.hidden;
        read_token(from, static_cast<int32_t>(step.type), 0, count, count, residual.data);
        if (!attention() || !mlp()) return false;
        for (int64_t i = 0; i < count; ++i) write(residual.data[i], to, step.type, i);
        return true;
    }
};

bool valid(const SlabStep& s) {
    return s.sequences > 0 && s.sequences <= kMaxTokens && is_float(s.type) && is_float(s.rotary_type) && s.rotary_dim >= 0 &&
           s.rotary_dim % 2 == 0;
}

bool valid(const SlabPlace& place) { return is_float(place.type) && place.first >= 0 && place.slot >= place.first; }

int64_t weights_of(const SlabBlock& b) {
    int64_t count = 0;
    for (const auto* p : {&b.query, &b.key, &b.value, &b.attention_out, &b.gate, &b.up, &b.down}) {
        count += p->weight.rows * p->weight.columns;
    }
    return count;
}

}  // namespace

int32_t slablm_blocks(int32_t set, const SlabBlock* blocks, const SlabPlace* places, int64_t count, const SlabStep* step,
                      int32_t threads) {
    const Kernels* kernels = kernels_of(set);
    if (kernels == nullptr || blocks == nullptr || places == nullptr || step == nullptr || count < 1) return -1;
    if (!valid(*step)) return -1;
    int64_t useful = 1;
    for (int64_t i = 0; i < count; ++i) {
        const SlabBlock& block = blocks[i];
        if (!valid(block) || !valid(places[i]) || step->rotary_dim > block.head_dim || block.hidden != blocks->hidden) return -1;
        useful = std::max(useful, weights_of(block) / kWeightsPerThread);
    }
    useful = std::min<int64_t>(std::max(threads, 1), useful);
    try {
        static thread_local Scratch memory;
        Scratch& leaders = memory;  // whoever leads
        Team team(kPhases * count);
        std::vector<BlockRun> runs;
        runs.reserve(static_cast<size_t>(count));
        for (int64_t i = 0; i < count; ++i) {
            runs.emplace_back(*kernels, blocks[i], places[i], *step, team, useful);
            memory.start(runs.back().bytes());  // so that there is enough, and nothing can fail below
        }
        bool finite = true;
        team.run(useful, [&] {
            const void* from = step->inputs;
            char* to = static_cast<char*>(step->outputs);
            for (auto& run : runs) {
                if (!(finite = run.run(from, to, leaders))) return;
                from = to;
                to += step->sequences * blocks->hidden * bytes_of(step->type);
            }
        });
        return finite ? 0 : kNotFinite;
    } catch (const std::exception&) {
        return -1;
    }
}
