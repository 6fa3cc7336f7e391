// G += X'X, pieces of work over threads. Every number of G belongs to one piece, which goes through the tokens in their
// order, so the sums are the same for any number of threads.
#include "gram.h"

#include <memory>
#include <new>

#include "runtime.h"

namespace {

constexpr int64_t kTokens = 2048;   // that are packed together: what a window has
constexpr int64_t kPackPanels = 8;  // about a kilobyte of every row
// A piece has so many panels of rows and of columns, and so many pairs of tokens are multiplied before the next ones are: all
// that stays in the second level of the cache, with G.
constexpr int64_t kRowPanels = 4, kColumnPanels = 4, kNearPairs = 256;
constexpr int64_t kProductsPerWeight = 16;  // take as long as one of slablm_matvec

const GramKernels* gram_of(int32_t set) {
#if defined(SLABLM_AVX512BF16)
    static const bool supported = __builtin_cpu_supports("avx512bf16");
    if (set == kAvx512 && supported) return &kAvx512Gram;
#endif
    (void)set;
    return nullptr;
}

int64_t parts_of(int64_t count, int64_t part) { return (count + part - 1) / part; }

// G += X'X of up to kTokens tokens: first pieces that pack, then pieces that multiply. The latter wait for the former, which
// others have begun by then, and not for a thread: one that is late or not there costs nothing.
struct Gram {
    const GramKernels& kernels;
    const uint16_t* rows;
    int64_t tokens;
    GramPanels panels;
    float* gram;
    int64_t count = parts_of(panels.columns, kPanelColumns);
    int64_t packs = parts_of(count, kPackPanels), across = parts_of(count, kColumnPanels);
    std::atomic<int64_t> packed{0};

    void pack(int64_t piece) {
        const int64_t begin = piece * kPackPanels;
        kernels.pack(rows, tokens, begin, std::min(begin + kPackPanels, count), panels);
        packed.fetch_add(1, std::memory_order_release);
    }

    void multiply(int64_t piece) {
        const int64_t top = piece / across * kRowPanels, first = piece % across * kColumnPanels;
        const int64_t bottom = std::min(top + kRowPanels, count), last = std::min(first + kColumnPanels, count);
        for (int64_t pair = 0; pair < panels.pairs; pair += kNearPairs) {
            const int64_t end = std::min(pair + kNearPairs, panels.pairs);
            for (int64_t right = std::max(first, top); right < last; ++right) {
                for (int64_t left = top; left < std::min(bottom, right + 1); ++left) {
                    kernels.multiply(panels, left, right, pair, end, gram);
                }
            }
        }
    }

    void run(int32_t threads) {
        const int64_t pieces = parts_of(count, kRowPanels) * across;
        const int64_t products = kRowPanels * kColumnPanels * kPanelColumns * kPanelColumns * panels.pairs;
        for_rows(0, packs + pieces, products / kProductsPerWeight, threads, 1, [&](int64_t begin, int64_t end) {
            for (int64_t piece = begin; piece < end; ++piece) {
                if (piece < packs) {
                    pack(piece);
                    continue;
                }
                while (packed.load(std::memory_order_acquire) < packs) std::this_thread::yield();
                multiply(piece - packs);
            }
        });
    }
};

struct Freed {
    void operator()(uint32_t* memory) const { operator delete(memory, std::align_val_t{64}); }
};

}  // namespace

int32_t slablm_add_gram(int32_t set, const uint16_t* rows, int64_t tokens, int64_t columns, float* gram,
                        int32_t threads) {
    const GramKernels* kernels = gram_of(set);
    if (kernels == nullptr) return kNoKernel;
    if (tokens < 0 || columns <= 0) return -1;
    const int64_t words = parts_of(columns, kPanelColumns) * kPanelColumns * parts_of(std::min(tokens, kTokens), 2);
    try {
        const size_t bytes = static_cast<size_t>(words) * sizeof(uint32_t);
        // Not kept for the next call: it would be memory that nobody counts.
        const std::unique_ptr<uint32_t, Freed> memory(static_cast<uint32_t*>(operator new(bytes, std::align_val_t{64})));
        for (; tokens > 0; tokens -= kTokens, rows += kTokens * columns) {
            const int64_t count = std::min(tokens, kTokens);
            Gram{*kernels, rows, count, {columns, parts_of(count, 2), memory.get()}, gram}.run(threads);
        }
    } catch (const std::exception&) {
        return -1;
    }
    return 0;
}
