// The C interface: which instruction sets this CPU has, and the division of a weight's rows over threads.
#include "runtime.h"

const Kernels* kernels_of(int32_t set) {
    switch (set) {
        case kPortable: return &kPortableKernels;
#if defined(SLABLM_AVX2)
        case kAvx2: return &kAvx2Kernels;
#endif
#if defined(SLABLM_AVX512)
        case kAvx512: return &kAvx512Kernels;
#endif
#if defined(SLABLM_NEON)
        case kNeon: return &kNeonKernels;
#endif
        default: return nullptr;
    }
}

namespace {

bool cpu_has(int32_t set) {
    switch (set) {
#if defined(__x86_64__)
        case kAvx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt") &&
                   __builtin_cpu_supports("f16c");
        case kAvx512:
            return cpu_has(kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                   __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
#endif
        default: return true;  // compiled in means present: NEON belongs to every 64-bit ARM
    }
}

// Activations of one call. Arrays of vectors come first.
Activations make_activations(const SlabWeight& weight, int64_t tokens, bool quick) {
    static thread_local Scratch memory;
    const int64_t words = (weight.columns + kWordBits - 1) / kWordBits, inputs = tokens * words * kWordBits;
    const int64_t ranks = quick ? weight.rank : 0, fixed = quick ? inputs : 0, scales = quick ? tokens * words : 0;
    memory.start(4 * inputs + (1 + ranks) * (2 * fixed + 4 * scales));
    Activations act{};
    act.tokens = tokens;
    memory.take(inputs, act.x);
    memory.take(fixed, act.x16);
    memory.take(ranks * fixed, act.z16);
    memory.take(scales, act.x_scales);
    memory.take(ranks * scales, act.z_scales);
    return act;
}

bool valid(const SlabWeight* weight) {
    return weight != nullptr && weight->rows >= 0 && weight->columns > 0 && weight->kept >= 0 &&
           weight->kept <= weight->columns && weight->rank >= 0 && weight->plane_count >= 1 && weight->plane_count <= 2 &&
           weight->value_type >= kFloat16 && weight->value_type <= kInt8 &&
           (weight->value_type == kInt8) == (weight->scales != nullptr);
}

}  // namespace

int32_t slablm_abi_version() { return kAbiVersion; }

int32_t slablm_supports(int32_t set) { return kernels_of(set) != nullptr && cpu_has(set); }

int32_t slablm_matvec(int32_t set, const SlabWeight* weight, const void* inputs, int32_t input_type, int64_t tokens,
                      void* outputs, int32_t output_type, int32_t threads) {
    const Kernels* kernels = kernels_of(set);
    if (kernels == nullptr || !valid(weight) || tokens < 0 || tokens > kMaxTokens) return -1;
    if (tokens == 0) return 0;
    const int64_t padded_tokens = next_power_of_two(tokens);
    const bool quick = weight->value_type == kInt8 && weight->rank <= kMaxQuickRank &&
                       padded_tokens <= kernels->quick_tokens;
    try {
        Activations act = make_activations(*weight, padded_tokens, quick);
        const bool suits = kernels->prepare(*weight, inputs, input_type, tokens, quick, act);
        const Output output{outputs, tokens, output_type};
        const auto run = quick && suits ? kernels->quick : kernels->exact;
        for_rows(0, weight->rows, weight->columns, threads,
                 [&](int64_t begin, int64_t end) { run(*weight, act, output, begin, end); });
    } catch (const std::exception&) {
        return -1;
    }
    return 0;
}

int32_t slablm_dense_matvec(int32_t set, const void* weight, int32_t weight_type, const uint16_t* scales, int64_t rows,
                            int64_t columns, const void* inputs, int32_t input_type, int64_t tokens, void* outputs,
                            int32_t output_type, int32_t threads) {
    const Kernels* kernels = kernels_of(set);
    const bool fits = rows >= 0 && columns > 0 && weight_type >= kFloat16 && weight_type <= kInt8 &&
                      (weight_type == kInt8) == (scales != nullptr);
    if (kernels == nullptr || !fits || tokens < 0 || tokens > kMaxTokens) return -1;
    if (tokens == 0) return 0;
    SlabWeight described{};
    described.rows = rows;
    described.columns = described.kept = columns;
    described.value_type = weight_type;
    described.values = weight;
    try {
        Activations act = make_activations(described, next_power_of_two(tokens), false);
        kernels->prepare(described, inputs, input_type, tokens, false, act);
        const Output output{outputs, tokens, output_type};
        for_rows(0, rows, columns, threads,
                 [&](int64_t begin, int64_t end) { kernels->dense(described, scales, act, output, begin, end); });
    } catch (const std::exception&) {
        return -1;
    }
    return 0;
}

int32_t slablm_unpack(int32_t set, const SlabWeight* weight, int64_t begin, int64_t end, void* output,
                      int32_t output_type, int32_t threads) {
    const Kernels* kernels = kernels_of(set);
    if (kernels == nullptr || !valid(weight) || begin < 0 || begin > end || end > weight->rows) return -1;
    const int64_t row_bytes = weight->columns * bytes_of(output_type);
    try {
        for_rows(begin, end, weight->columns, threads, [&](int64_t first, int64_t last) {
            kernels->unpack(*weight, first, last, static_cast<unsigned char*>(output) + (first - begin) * row_bytes,
                            output_type);
        });
    } catch (const std::exception&) {
        return -1;
    }
    return 0;
}

int32_t slablm_symbols_matvec(int32_t set, const SlabSymbols* weight, const void* inputs, int32_t input_type,
                              int64_t tokens, void* outputs, int32_t output_type, int32_t threads) {
    const Kernels* kernels = kernels_of(set);
    if (kernels == nullptr || !valid(weight) || tokens < 0 || tokens > kMaxTokens) return -1;
    if (tokens == 0) return 0;
    const int64_t padded_tokens = next_power_of_two(tokens);
    try {
        static thread_local Scratch memory;
        memory.start(activation_bytes(weight->columns, padded_tokens));
        SymbolActivations act = take_activations(memory, weight->columns, padded_tokens);
        const bool quick = padded_tokens <= kernels->quick_symbol_tokens;
        const Suits suits = kernels->prepare_symbols(*weight, inputs, input_type, tokens, quick, act);
        if (suits == Suits::kNeither) return kNotFinite;
        const Output output{outputs, tokens, output_type};
        const auto run = suits == Suits::kQuick ? kernels->quick_symbols : kernels->exact_symbols;
        for_rows(0, weight->rows, weight->columns, threads,
                 [&](int64_t begin, int64_t end) { run(*weight, act, output, begin, end); });
    } catch (const std::exception&) {
        return -1;
    }
    return 0;
}

int32_t slablm_symbols_unpack(int32_t set, const SlabSymbols* weight, int64_t begin, int64_t end, void* output,
                              int32_t output_type, int32_t threads) {
    const Kernels* kernels = kernels_of(set);
    if (kernels == nullptr || !valid(weight) || begin < 0 || begin % kTileRows != 0) return -1;
    if (begin > end || end > weight->rows) return -1;
    const int64_t row_bytes = weight->columns * bytes_of(output_type);
    try {
        for_rows(begin, end, weight->columns, threads, [&](int64_t first, int64_t last) {
            unsigned char* rows = static_cast<unsigned char*>(output) + (first - begin) * row_bytes;
            kernels->unpack_symbols(*weight, first, last, rows, output_type);
        });
    } catch (const std::exception&) {
        return -1;
    }
    return 0;
}

int32_t slablm_rotate(int32_t set, float* rows, int64_t count, int64_t columns, int64_t block, uint64_t seed,
                      int32_t restore) {
    const Kernels* kernels = kernels_of(set);
    if (kernels == nullptr || count < 0 || columns <= 0 || !rotates(columns, block)) return -1;
    const size_t padded = static_cast<size_t>((columns + kTileColumns - 1) / kTileColumns * kTileColumns);
    try {
        std::vector<float> row(padded, 0.0f);
        for (int64_t i = 0; i < count; ++i, rows += columns) {
            std::copy(rows, rows + columns, row.begin());
            kernels->rotate(row.data(), columns, block, seed, restore != 0);
            std::copy(row.begin(), row.begin() + columns, rows);
        }
    } catch (const std::exception&) {
        return -1;
    }
    return 0;
}

namespace {

TrellisKernel trellis_of(int32_t set) {
    switch (set) {
        case kPortable: return kPortableTrellis;
#if defined(SLABLM_AVX2)
        case kAvx2: return kAvx2Trellis;
#endif
#if defined(SLABLM_AVX512)
        case kAvx512: return kAvx512Trellis;
#endif
#if defined(SLABLM_NEON)
        case kNeon: return kNeonTrellis;
#endif
        default: return nullptr;
    }
}

}  // namespace

int32_t slablm_trellis_columns(int32_t set, const TrellisBlock* block, int32_t threads) {
    constexpr int64_t kWeightsPerEntry = 100;  // of a product, which take as long
    const TrellisKernel settle = trellis_of(set);
    if (settle == nullptr || block == nullptr || block->rows < 0 || block->columns < 0) return -1;
    if (block->bits < 2 || block->bits > 6) return -1;
    const auto run = [&](float* scratch, int64_t begin, int64_t end) { settle(*block, begin, end, scratch); };
    const int64_t numbers = kMostBatchRows * block->columns, work = kWeightsPerEntry * block->columns;
    return for_rows_with<float>(numbers, block->rows, work, threads, run) ? 0 : -1;
}
