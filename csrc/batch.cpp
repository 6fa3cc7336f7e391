// Many tokens: all inputs are prepared first, threads share the tokens; then they share the rows of the weight.
#include "runtime.h"

namespace {

// Inputs are prepared so many at a time: their memory does not grow with the tokens.
constexpr int64_t kTokensAtATime = 1024;
constexpr int64_t kTilesPerSegment = 8;  // sums stay below 127.5 * 16382 * 1024 < 2^31

BatchActivations take_batch(Scratch& memory, const SlabSymbols& weight, int64_t tokens, int64_t planes) {
    BatchActivations act{};
    act.tokens = tokens;
    act.planes = planes;
    act.padded = (weight.columns + kTileColumns - 1) / kTileColumns * kTileColumns;
    act.segment = weight.block == 0 ? kTileColumns : kTilesPerSegment * kTileColumns;
    act.segments = (act.padded + act.segment - 1) / act.segment;
    memory.start(tokens * (planes * act.padded + 8 * act.segments));
    memory.take(tokens * planes * act.padded, act.x);
    memory.take(tokens * act.segments, act.starts);
    memory.take(tokens * act.segments, act.scales);
    return act;
}

int32_t prepare(const Kernels& kernels, const SlabSymbols& weight, const void* inputs, int32_t type, int64_t tokens,
                int32_t threads, const BatchActivations& act) {
    std::atomic<bool> finite{true};
    const int64_t scales = tokens * act.segments, all_scales = act.tokens * act.segments;
    std::fill(act.x + tokens * act.planes * act.padded, act.x + act.tokens * act.planes * act.padded, int8_t{0});
    std::fill(act.starts + scales, act.starts + all_scales, 0);
    std::fill(act.scales + scales, act.scales + all_scales, 0.0f);
    const int64_t work = kWeightsPerInput * weight.columns;
    const bool enough = for_rows_with<float>(2 * act.padded, tokens, work, threads, [&](float* room, int64_t begin, int64_t end) {
        if (!kernels.prepare_batch(weight, inputs, type, begin, end, room, act)) finite = false;
    });
    return !enough ? -1 : finite ? 0 : kNotFinite;
}

int32_t multiply(const Kernels& kernels, const SlabSymbols& weight, const BatchActivations& act, const Output& output,
                 int32_t threads) {
    const auto run = [&](uint8_t* bytes, int64_t begin, int64_t end) {
        kernels.batch_symbols(weight, act, output, begin, end, bytes);
    };
    const int64_t work = weight.columns * output.tokens, share = rows_per_piece(weight.rows, std::max(threads, 1));
    const int64_t piece = (share + kBatchRows - 1) / kBatchRows * kBatchRows;
    return for_rows_with<uint8_t>(kBatchRows * act.padded, weight.rows, work, threads, piece, run) ? 0 : -1;
}

}  // namespace

int32_t multiply_many(const Kernels& kernels, const SlabSymbols& weight, const void* inputs, int32_t input_type,
                      int64_t tokens, int64_t input_bits, const Output& output, int32_t threads) {
    static thread_local Scratch memory;
    const int64_t planes = input_bits == 8 && weight.block != 0 ? 1 : 2, together = kernels.batch_tokens / planes;
    for (int64_t first = 0; first < tokens; first += kTokensAtATime) {
        const int64_t count = std::min(kTokensAtATime, tokens - first);
        const int64_t filled_up = (count + together - 1) / together * together;
        const BatchActivations act = take_batch(memory, weight, filled_up, planes);
        const char* from = static_cast<const char*>(inputs) + first * weight.columns * bytes_of(input_type);
        char* to = static_cast<char*>(output.data) + first * weight.rows * bytes_of(output.type);
        int32_t status = prepare(kernels, weight, from, input_type, count, threads, act);
        if (status == 0) status = multiply(kernels, weight, act, Output{to, count, output.type}, threads);
        if (status != 0) return status;
    }
    return 0;
}

int32_t slablm_symbols_matmul(int32_t set, const SlabSymbols* weight, const void* inputs, int32_t input_type,
                              int64_t tokens, int32_t input_bits, void* outputs, int32_t output_type,
                              int32_t threads) {
    const Kernels* kernels = kernels_of(set);
    if (kernels == nullptr || !valid(weight) || tokens < 0 || (input_bits != 8 && input_bits != 14)) return -1;
    if (kernels->batch_tokens == 0) return kNoKernel;
    try {
        return multiply_many(*kernels, *weight, inputs, input_type, tokens, input_bits, Output{outputs, tokens, output_type}, threads);
    } catch (const std::exception&) {
        return -1;
    }
}
