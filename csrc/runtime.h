// What the functions of the C interface share: threads, scratch memory, and inputs of weights in symbols.
//
// Threads come from the OpenMP runtime that torch has already loaded, found by name at run time (GOMP_parallel, which
// GNU and LLVM runtimes both export). Linking against OpenMP would load a second runtime beside a renamed copy inside
// torch, and two pools of spinning threads would fight for the cores. Without one, threads are started per call; so they
// are in a forked process, where the pool's threads are gone and GNU's runtime would wait for them forever.
//
// Included by units that are compiled for any CPU, unlike kernels.h.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#include "slablm.h"

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

// The kernels of an instruction set that this library has, or null.
const Kernels* kernels_of(int32_t set);

// Below this many weights per thread, waking a thread costs more than it saves.
constexpr int64_t kWeightsPerThread = 100'000;
// What is done to a number between products takes as long as so many weights.
constexpr int64_t kWeightsPerInput = 16;
// Rows are handed out in pieces, so that a thread whose core is busy elsewhere holds up the others only a little.
constexpr int64_t kPiecesPerThread = 8;
constexpr int64_t kRowsPerPiece = 8;

// Many tokens, as slablm_symbols_matmul.
int32_t multiply_many(const Kernels& kernels, const SlabSymbols& weight, const void* inputs, int32_t input_type,
                      int64_t tokens, int64_t input_bits, const Output& output, int32_t threads);

// --- Threads -------------------------------------------------------------------------------------------------------

using GompParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// Set in every child that is forked from a process with this library.
inline std::atomic<bool> forked{false};
#if !defined(_WIN32)
[[maybe_unused]] inline const int forks_are_noticed = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

inline GompParallel find_gomp_parallel() {
#if defined(_WIN32)
    return nullptr;
#else
    return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
}

// Rows [begin, end) in pieces; each thread takes the next one until none is left.
template <class Work>
struct RowQueue {
    const Work& work;
    int64_t end, piece;
    std::atomic<int64_t> next;

    static void drain(void* pointer) {
        auto& queue = *static_cast<RowQueue*>(pointer);
        for (int64_t row; (row = queue.next.fetch_add(queue.piece, std::memory_order_relaxed)) < queue.end;) {
            queue.work(row, std::min(row + queue.piece, queue.end));
        }
    }
};

// Runs the function on `count` threads, or on fewer if the system gives no more: the work is the same.
inline void on_own_threads(void (*function)(void*), void* data, int64_t count) {
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<size_t>(count - 1));
    try {
        for (int64_t i = 1; i < count; ++i) helpers.emplace_back(function, data);
    } catch (const std::exception&) {  // no thread, or no memory for one
    }
    function(data);
    for (auto& helper : helpers) helper.join();
}

inline int64_t rows_per_piece(int64_t rows, int64_t threads) {
    const int64_t share = (rows + threads * kPiecesPerThread - 1) / (threads * kPiecesPerThread);
    return (share + kRowsPerPiece - 1) / kRowsPerPiece * kRowsPerPiece;
}

template <class Work>
void for_rows(int64_t begin, int64_t end, int64_t columns, int32_t threads, int64_t piece, const Work& work) {
    static const GompParallel gomp_parallel = find_gomp_parallel();
    const int64_t rows = end - begin;
    const int64_t useful = std::max<int64_t>(1, rows * columns / kWeightsPerThread);
    const int64_t count = std::min<int64_t>(std::max(threads, 1), useful);
    if (count == 1) return work(begin, end);
    RowQueue<Work> queue{work, end, piece > 0 ? piece : rows_per_piece(rows, count), {begin}};
    if (gomp_parallel == nullptr || forked) return on_own_threads(RowQueue<Work>::drain, &queue, count);
    gomp_parallel(RowQueue<Work>::drain, &queue, static_cast<unsigned>(count), 0);
}

template <class Work>
void for_rows(int64_t begin, int64_t end, int64_t columns, int32_t threads, const Work& work) {
    for_rows(begin, end, columns, threads, 0, work);
}

// --- Scratch memory ------------------------------------------------------------------------------------------------

// Memory that belongs to the calling thread and is kept for the next call. It begins where a line of the cache does: a
// vector that lies in two lines takes twice as long to read.
class Scratch {
    std::vector<unsigned char> bytes;
    unsigned char* next = nullptr;

public:
    void start(int64_t needed) {
        constexpr size_t kLine = 64;
        const size_t size = static_cast<size_t>(needed) + kLine;
        if (bytes.size() < size) bytes.resize(size);
        next = bytes.data() + (kLine - reinterpret_cast<uintptr_t>(bytes.data()) % kLine) % kLine;
    }
    template <class T>
    void take(int64_t count, T*& out) {
        out = reinterpret_cast<T*>(next);
        next += sizeof(T) * static_cast<size_t>(count);
    }
};

// Runs work(memory, begin, end) for rows on several threads, with so many numbers of memory for each. Returns whether there
// was memory for all of them.
template <class T, class Work>
bool for_rows_with(int64_t count, int64_t rows, int64_t columns, int32_t threads, int64_t piece, const Work& work) {
    std::atomic<bool> enough{true};
    for_rows(0, rows, columns, threads, piece, [&](int64_t begin, int64_t end) {
        static thread_local Scratch memory;
        T* taken;
        try {
            memory.start(count * static_cast<int64_t>(sizeof(T)));
        } catch (const std::exception&) {
            enough = false;
            return;
        }
        memory.take(count, taken);
        work(taken, begin, end);
    });
    return enough;
}

template <class T, class Work>
bool for_rows_with(int64_t count, int64_t rows, int64_t columns, int32_t threads, const Work& work) {
    return for_rows_with<T>(count, rows, columns, threads, 0, work);
}

// --- Inputs --------------------------------------------------------------------------------------------------------

// Of a number of one of the float types.
inline int64_t bytes_of(int64_t type) { return type == kFloat32 ? 4 : 2; }

inline int64_t next_power_of_two(int64_t count) {
    int64_t power = 1;
    while (power < count) power *= 2;
    return power;
}

// Bytes of `take_activations`.
inline int64_t activation_bytes(int64_t columns, int64_t tokens) {
    const int64_t tiles = tokens * ((columns + kTileColumns - 1) / kTileColumns);
    return 6 * tiles * kTileColumns + 4 * kMostLanes * tiles + (4 * tiles + 63) / 64 * 64;
}

// Arrays of vectors come first, and what follows begins where a line of the cache does.
inline SymbolActivations take_activations(Scratch& memory, int64_t columns, int64_t tokens) {
    SymbolActivations act{};
    act.tokens = tokens;
    act.tiles = (columns + kTileColumns - 1) / kTileColumns;
    const int64_t tiles = tokens * act.tiles, inputs = tiles * kTileColumns;
    memory.take(inputs, act.x);
    memory.take(inputs, act.x16);
    memory.take(kMostLanes * tiles, act.starts);
    memory.take((4 * tiles + 63) / 64 * 16, act.x_scales);
    return act;
}

inline bool rotates(int64_t columns, int64_t block) {
    return block > 0 && (block & (block - 1)) == 0 && columns % block == 0;
}

inline bool valid(const SlabSymbols* weight) {
    return weight != nullptr && weight->rows >= 0 && weight->columns > 0 && weight->bits >= 2 && weight->bits <= 6 &&
           (weight->block == 0 || rotates(weight->columns, weight->block));
}
