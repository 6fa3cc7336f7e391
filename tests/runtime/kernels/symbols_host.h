// The CUDA text for a CPU: a block of threads as fibers that take turns on one thread, and the instructions that
// the text asks for. Include it before the text, and put LAUNCHER(name) for each kernel behind it.
//
// A fiber runs until it has to wait for others, and a warp until all of it waits for other warps, so that these are as
// far behind as they can be. In one of two orders, `adverse`, the last comes first and copies to shared memory happen
// at once; in the other they happen as late as the waits allow. Where a barrier or a wait is missing, one of the two
// gives something else. Shared memory holds NaN in the beginning of every block, and a kernel that writes behind what
// was asked for is found out, and so is one that copies what is in none of its tensors.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// All fibers of a block, which share a thread, share it; and at the start of a function it may be `extern`.
#define __shared__ thread_local

using std::max;
using std::min;

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim;

enum { WARP = 32, COPY_BYTES = 16, MOST_THREADS = 1024, STACK = 1 << 16, SHARED = 240 << 10, POISON = 0xFF };
extern "C" {
alignas(16) thread_local float columns[SHARED / sizeof(float)];
alignas(16) thread_local uint4 memory[SHARED / sizeof(uint4)];
}

// -------------------------------------------------------------------------------------------------------------- fibers

struct Copy {
    unsigned char* to;
    const unsigned char* from;
};

struct Range {
    const unsigned char *begin, *end;
    bool holds(const unsigned char* copied) const { return begin <= copied && copied + COPY_BYTES <= end; }
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool done;
    std::vector<Copy> open;              // copies of the stage that is not closed
    std::deque<std::vector<Copy>> stages;
};

// Where a number of threads wait for each other, again and again.
struct Meeting {
    int arrived, round;
};

static Fiber fibers[MOST_THREADS];
static ucontext_t scheduler;
static int running;
static long steps_taken;  // ends of fibers, and arrivals at meetings
static bool adverse, strayed;
static Range tensors[16];  // of the kernel
static int tensor_count;
static Meeting blocks_meeting, warps_meetings[MOST_THREADS / WARP];
static unsigned exchanged[MOST_THREADS][2][6];  // of each thread, in turns: before the next of a kind all have read
static int turns[MOST_THREADS];

static void give_way() { swapcontext(&fibers[running].context, &scheduler); }

static void meet_others(Meeting& meeting, int count) {
    const int round = meeting.round;
    steps_taken++;
    if (++meeting.arrived == count) meeting.arrived = 0, meeting.round++;
    else
        while (meeting.round == round) give_way();
}

static inline void __syncthreads() { meet_others(blocks_meeting, blockDim.x); }
static inline void __syncwarp() { meet_others(warps_meetings[running / WARP], WARP); }

// What each lane of the warp has brought, [lane][turn]...
static unsigned (*exchange(const unsigned* brought, int count, int& turn))[2][6] {
    turn = turns[running]++ % 2;
    std::copy(brought, brought + count, exchanged[running][turn]);
    __syncwarp();
    return exchanged + running / WARP * WARP;
}

// -------------------------------------------------------------------------------------------------------- instructions

template <typename To, typename From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

static inline float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }
static inline float __int_as_float(int bits) { return bits_as<float>(bits); }
static inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }
static inline int __float2int_rn(float value) { return std::isnan(value) ? 0 : (int)std::nearbyint(value); }
static inline float rsqrtf(float value) { return 1 / std::sqrt(value); }
template <typename T>
inline T __ldg(const T* from) { return *from; }

static inline float from_half(unsigned short bits) { return bits_as<_Float16>(bits); }
static inline unsigned short to_half(float value) { return bits_as<unsigned short>((_Float16)value); }
static inline unsigned short to_bfloat16(float value) {
    if (std::isnan(value)) return 0x7FFF;
    const unsigned bits = __float_as_uint(value);
    return (unsigned short)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    int turn;
    const auto all = exchange(&value, 1, turn);
    for (int lane = 0; lane < WARP; lane++) value = max(value, all[lane][turn][0]);
    return value;
}

static inline int __reduce_add_sync(unsigned, int value) {
    const unsigned brought = value;
    int turn, sum = 0;
    const auto all = exchange(&brought, 1, turn);
    for (int lane = 0; lane < WARP; lane++) sum += (int)all[lane][turn][0];
    return sum;
}

static inline float __shfl_xor_sync(unsigned, float value, int apart) {
    const unsigned brought = __float_as_uint(value);
    int turn;
    const auto all = exchange(&brought, 1, turn);
    return __uint_as_float(all[running % WARP ^ apart][turn][0]);
}

static void copy(const Copy& copy) { memcpy(copy.to, copy.from, COPY_BYTES); }

static inline void fetch(unsigned char* to, const unsigned char* from) {
    // What the GPU refuses: addresses that are no multiple of the size.
    if ((size_t)to % COPY_BYTES || (size_t)from % COPY_BYTES) __builtin_trap();
    const Copy wanted = {to, from};
    if (std::none_of(tensors, tensors + tensor_count, [=](const Range& tensor) { return tensor.holds(from); }))
        strayed = true;
    else if (adverse) copy(wanted);
    else fibers[running].open.push_back(wanted);
}

static inline void close_stage() {
    fibers[running].stages.push_back(std::move(fibers[running].open));
    fibers[running].open.clear();
}

template <int LEFT>
inline void wait_for_stages() {
    auto& stages = fibers[running].stages;
    for (; stages.size() > LEFT; stages.pop_front()) std::for_each(stages.front().begin(), stages.front().end(), copy);
}

static inline void wait_for_all() {
    close_stage();
    wait_for_stages<0>();
}

static inline int byte_of(unsigned word, int k) { return (signed char)(word >> (8 * k)); }

static inline int dot4(unsigned a, unsigned b, int sum) {
    for (int k = 0; k < 4; k++) sum += byte_of(a, k) * byte_of(b, k);
    return sum;
}

// The fragments as the PTX manual has them. A: row g and g + 8, columns 4t … and 16 + 4t …, in a0, a1 and a2, a3. B:
// column g, rows 4t … and 16 + 4t …. Sums: rows g and g + 8, columns 2t and 2t + 1.
static inline void multiply_next(int* sums, const unsigned* a, unsigned b0, unsigned b1) {
    const unsigned brought[6] = {a[0], a[1], a[2], a[3], b0, b1};
    int turn;
    const auto all = exchange(brought, 6, turn);
    const int g = running % WARP / 4, t = running % 4;
    for (int c = 0; c < 4; c++)
        for (int k = 0; k < 32; k++) {
            const int lane = k % 16 / 4;
            const unsigned from_a = all[4 * g + lane][turn][c / 2 + k / 16 * 2];
            const unsigned from_b = all[4 * (2 * t + c % 2) + lane][turn][4 + k / 16];
            sums[c] += byte_of(from_a, k % 4) * byte_of(from_b, k % 4);
        }
}

static inline void multiply_first(int* sums, const unsigned* a, unsigned b0, unsigned b1) {
    std::fill(sums, sums + 4, 0);
    multiply_next(sums, a, b0, b1);
}

// -------------------------------------------------------------------------------------------------------------- launch

static std::function<void()> started;

static void run_fiber() {
    started();
    fibers[running].done = true, steps_taken++;
    give_way();
}

static void start_fiber(Fiber& fiber) {
    fiber.done = false, fiber.open.clear(), fiber.stages.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, run_fiber, 0);
}

static void resume(int thread) {
    if (fibers[thread].done) return;
    running = thread, threadIdx = {(unsigned)thread, 0, 0};
    swapcontext(&scheduler, &fibers[thread].context);
}

// All threads from `first` on, again and again until each is at its end or waits for others than these.
static void run_warp(int first, int count) {
    for (long before = -1; before != steps_taken;) {
        before = steps_taken;
        for (int k = 0; k < count; k++) resume(first + (adverse ? count - 1 - k : k));
    }
}

// Whether all threads of a block come to their end. If all wait, nobody takes a step.
static bool run_block(int threads) {
    blocks_meeting = {}, std::fill_n(warps_meetings, MOST_THREADS / WARP, Meeting());
    std::fill_n(turns, threads, 0);
    std::for_each(fibers, fibers + threads, start_fiber);
    const int warps = (threads + WARP - 1) / WARP;
    for (long before = -1; before != steps_taken;) {
        before = steps_taken;
        for (int k = 0; k < warps; k++) {
            const int first = WARP * (adverse ? warps - 1 - k : k);
            run_warp(first, min<int>(WARP, threads - first));
        }
    }
    return std::all_of(fibers, fibers + threads, [](const Fiber& fiber) { return fiber.done; });
}

template <typename T>
bool untouched(const T& shared, int from) {
    const unsigned char* const bytes = (const unsigned char*)shared;
    return std::all_of(bytes + from, bytes + sizeof(shared), [](unsigned char byte) { return byte == POISON; });
}

template <typename... Types, size_t... K>
void call(void (*kernel)(Types...), void** arguments, std::index_sequence<K...>) {
    kernel(*(Types*)arguments[K]...);
}

enum { FINE_SO_FAR, WRONG_COUNT, NEVER_ENDS, BEHIND_SHARED, NO_TENSOR };

template <typename... Types>
int launch(void (*kernel)(Types...), void** arguments, int count, int x, int y, int threads, int shared, int order) {
    if (count != sizeof...(Types)) return WRONG_COUNT;
    adverse = order, strayed = false, blockDim = {(unsigned)threads, 1, 1};
    started = [=] { call(kernel, arguments, std::index_sequence_for<Types...>()); };
    for (int block = 0; block < x * y; block++) {
        memset(columns, POISON, sizeof(columns)), memset(memory, POISON, sizeof(memory));
        blockIdx = {(unsigned)(block % x), (unsigned)(block / x), 0};
        if (!run_block(threads)) return NEVER_ENDS;
        if (!untouched(columns, shared) || !untouched(memory, shared)) return BEHIND_SHARED;
        if (strayed) return NO_TENSOR;
    }
    return FINE_SO_FAR;
}

extern "C" void lend(const Range* lent, int count) { std::copy(lent, lent + (tensor_count = count), tensors); }

#define LAUNCHER(name)                                                                                            \
    extern "C" int launch_##name(void** arguments, int count, int x, int y, int threads, int shared, int order) { \
        return launch(name, arguments, count, x, y, threads, shared, order);                                      \
    }
