// Weights in symbols on NVIDIA GPUs, as in slablm/runtime/kernels/gpu_symbols.py, where the constants in capitals and
// the text of symbols_decode.cuh come from.
//
// A few tokens. `quantize` turns inputs, once rotated, into 16-bit integers with a scale per token and tile: q = 256 hi
// + lo, two bytes. It does so twice, for x and for y = v x, which meets the background. `matvec` multiplies both, byte
// by byte on tensor cores (m16n8k32): 16 rows of a weight in registers, and hi and lo of 4 tokens as the 8 columns of
// the other factor. Levels that lie on a grid (see slablm/methods/alphabet.py) are integers of 7 bits, so that a tile
// takes four products: the levels of positive and of negative symbols with x, and their backgrounds with y. Others
// (FINE) are integers of 14 bits, a = (128 h + l) / 16383 of the largest, again two bytes, and take two products more.
//
// The sums of a tile start at MAGIC, the float 1.5 2^23: as long as they stay below 2^22 their bits are those of the
// float MAGIC + sum, and the difference of a positive and a negative part is one subtraction of floats, no conversion.
// 128 columns of at most 127 x 128 are 2^21.
//
// An operand has a record per tile and four tokens: its bytes in the order in which lanes read them, [kind: x, y][half of
// the steps][column of the fragment][t][16 bytes], then its units, [token][kind].
//
// A block has K_WARPS times ROW_WARPS warps. Those of one K share a span of tiles and the operand's records of it, each
// for 16 rows of the weight; in the end the sums of all spans are added. Tiles and records come to shared memory some
// tiles ahead, in a ring of DEPTH stages.

#define MAGIC 0x4B400000
#define ROWS (16 * FRAGMENTS)
#define BLOCK_ROWS (ROWS * ROW_WARPS)
#define QUADS ((TOKENS + 3) / 4)
#define COLUMNS (TOKENS >= 4 ? 8 : TOKENS >= 2 ? 4 : 2)
#define TILE 128
#define UNIT_BYTES 32
#define RECORD_BYTES(W) (64 * (W) * COLUMNS + UNIT_BYTES)

typedef unsigned short half_bits;

// Single instructions. Tests without a GPU have their own in C++, and compile all the rest as it is.
#ifdef __CUDACC__
__device__ __forceinline__ float from_half(half_bits bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ half_bits to_half(float value) {
    half_bits bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
__device__ __forceinline__ half_bits to_bfloat16(float value) {
    half_bits bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Global to shared memory, without registers and without waiting.
template <int BYTES>
__device__ __forceinline__ void fetch(u8* to, const u8* from) {
    const u32 address = (u32)__cvta_generic_to_shared(to);
    if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void close_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// For all stages that were closed but the last `LEFT`.
template <int LEFT>
__device__ __forceinline__ void wait_for_stages() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
__device__ __forceinline__ void wait_for_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Of so many threads, in whole warps; `index` 1 to 15, for each group of them.
template <int THREADS>
__device__ __forceinline__ void barrier(int index) {
    asm volatile("bar.sync %0, %1;" ::"r"(index), "n"(THREADS) : "memory");
}

// 16 x 32 times 32 x 8 bytes with signs: sums that start anew, and that go on.
__device__ __forceinline__ void multiply_first(int* sums, const u32* a, u32 b0, u32 b1, int start) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(start));
}
__device__ __forceinline__ void multiply_next(int* sums, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

#if TYPE == 0
typedef float scalar;
__device__ __forceinline__ float widen(scalar value) { return value; }
__device__ __forceinline__ scalar narrow(float value) { return value; }
#elif TYPE == 1
typedef half_bits scalar;
__device__ __forceinline__ float widen(scalar value) { return from_half(value); }
__device__ __forceinline__ scalar narrow(float value) { return to_half(value); }
#else
typedef half_bits scalar;
__device__ __forceinline__ float widen(scalar value) { return __uint_as_float((u32)value << 16); }
__device__ __forceinline__ scalar narrow(float value) { return to_bfloat16(value); }
#endif

// Integers of the levels, and what one of them is worth.
struct Levels {
    Table high, low;
    float unit;
    u32 unused[7];
};

// The next launch may start before this one ends (programmatic dependent launch), and waits before it reads from it.
__device__ __forceinline__ void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ int tiles_of(int n) { return (n + TILE - 1) / TILE; }
__device__ __forceinline__ int halves_of(int n) { return (n + TILE / 2 - 1) / (TILE / 2); }

// ---------------------------------------------------------------------------------------------------------- inputs

// Padded, so that neighbouring threads with 8 columns each do not meet in one bank.
__device__ __forceinline__ int place(int column) { return column + (column >> 3); }

// The butterflies of so many columns that a thread has, for the bits below `end`.
template <int COUNT>
__device__ __forceinline__ void butterflies(float* own, int end) {
#pragma unroll
    for (int bit = 1; bit < COUNT; bit *= 2)
        if (bit < end)
#pragma unroll
            for (int k = 0; k < COUNT; k++)
                if (!(k & bit)) {
                    const float sum = own[k] + own[k | bit];
                    own[k | bit] = own[k] - own[k | bit];
                    own[k] = sum;
                }
}

// So many columns, one step of the transform apart, of `size` in shared memory.
template <int COUNT>
__device__ __forceinline__ void stages(float* columns, int size, int step) {
    for (int group = threadIdx.x; group < size / COUNT; group += blockDim.x) {
        const int below = group & (step - 1), first = (group - below) * COUNT + below;
        float own[COUNT];
#pragma unroll
        for (int k = 0; k < COUNT; k++) own[k] = columns[place(first + k * step)];
        butterflies<COUNT>(own, COUNT);
#pragma unroll
        for (int k = 0; k < COUNT; k++) columns[place(first + k * step)] = own[k];
    }
    __syncthreads();
}

struct alignas(16) Eight {
    half_bits parts[8];
};

// Eight neighbouring numbers; 0 behind the last one.
__device__ __forceinline__ void load_eight(half_bits* own, const half_bits* from, int count) {
    if (count >= 8 && (u64)from % 16 == 0) {
        *(Eight*)own = *(const Eight*)from;
        return;
    }
#pragma unroll
    for (int k = 0; k < 8; k++) own[k] = k < count ? from[k] : 0;
}

__device__ __forceinline__ void load_inputs(float* own, const scalar* from, int count) {
#if TYPE == 0
#pragma unroll
    for (int k = 0; k < 8; k++) own[k] = k < count ? from[k] : 0.f;
#else
    Eight loaded;
    load_eight(loaded.parts, from, count);
#pragma unroll
    for (int k = 0; k < 8; k++) own[k] = widen(loaded.parts[k]);
#endif
}

// `size` columns of a token from `start` on, rotated, into shared memory; 0 behind the last one.
__device__ __forceinline__ void rotated(
    float* columns, const scalar* inputs, const u32* minus, int n, int start, int size, int block) {
    const float norm = block ? rsqrtf((float)block) : 1.f;
    for (int k = 8 * threadIdx.x; k < size; k += 8 * blockDim.x) {
        const int column = start + k;
        float own[8];
        load_inputs(own, inputs + column, n - column);
        const u32 signs = block && column < n ? ((const u8*)minus)[column / 8] : 0;
#pragma unroll
        for (int j = 0; j < 8; j++) own[j] *= signs >> j & 1 ? -norm : norm;
        butterflies<8>(own, block);
#pragma unroll
        for (int j = 0; j < 8; j++) columns[place(k) + j] = own[j];
    }
    __syncthreads();
    for (int step = 8; step < block;) {
        const int left = block / step;
        if (left >= 8) stages<8>(columns, size, step), step *= 8;
        else if (left == 4) stages<4>(columns, size, step), step *= 4;
        else stages<2>(columns, size, step), step *= 2;
    }
}

// Grid: tokens, pieces of `size` columns.
extern "C" __global__ void rotate(
    const scalar* inputs, const u32* minus, scalar* outputs, int n, int size, int block) {
    extern __shared__ float columns[];
    const int start = blockIdx.y * size;
    const long long token = blockIdx.x;
    rotated(columns, inputs + token * n, minus, n, start, size, block);
    for (int k = threadIdx.x; k < size && start + k < n; k += blockDim.x)
        outputs[token * n + start + k] = narrow(columns[place(k)]);
}

// The four columns of a lane as 16-bit integers in two words, and the unit of the tile.
__device__ __forceinline__ float integers(const float* values, u32* high, u32* low) {
    // Of floats without a sign the bits ascend as they do, and NaN is above all.
    u32 bits = 0;
#pragma unroll
    for (int k = 0; k < 4; k++) bits = max(bits, __float_as_uint(fabsf(values[k])));
    bits = __reduce_max_sync(~0u, bits);
    const float most = 127 * 256 + 127, largest = __uint_as_float(bits);
    const float scale = largest > 1e-30f ? most / largest : 0.f;  // of what is smaller the scale would not be finite
    *high = *low = 0;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const int q = __float2int_rn(fminf(fmaxf(values[k] * scale, -most), most)), hi = (q + 128) >> 8;
        *high |= (u32)(hi & 255) << (8 * k);
        *low |= (u32)((q - 256 * hi) & 255) << (8 * k);
    }
    // A token that is not finite becomes NaN as a whole.
    return bits < 0x7F800000 ? largest / most : __int_as_float(0x7FFFFFFF);
}

// `steps` of the grid up to the largest level.
__device__ void write_levels(const half_bits* levels, Levels* written, int steps) {
    const int count = (1 << (BITS - 1)) - 1;
    const float largest = from_half(levels[count - 1]);
    Levels result = {};
#pragma unroll
    for (int c = 1; c <= count; c++) {
        const u32 q = largest > 0 ? __float2uint_rn(from_half(levels[c - 1]) / largest * steps) : 0;
        result.high.words[c / 4] |= (FINE ? q >> 7 : q) << (8 * (c % 4));
        result.low.words[c / 4] |= (FINE ? q & 127 : 0) << (8 * (c % 4));
    }
    result.unit = largest / steps;
    *written = result;
}

// Grid: pieces of `size` columns (a multiple of a tile, and of a block of the rotation), and one for the levels; tokens.
extern "C" __global__ void __launch_bounds__(512) quantize(
    const scalar* inputs, const u32* minus, const half_bits* right, const half_bits* levels, u8* operand,
    Levels* written, int n, int size, int block, int steps) {
    extern __shared__ float columns[];
    half_bits* const factors = (half_bits*)(columns + place(size));  // a multiple of 16 bytes behind
    const int start = blockIdx.x * size, token = blockIdx.y, lane = threadIdx.x % 32;
    start_next();
    for (int k = 8 * threadIdx.x; k < size; k += 8 * blockDim.x)
        load_eight(factors + k, right + start + k, n - start - k);
    wait_for_previous();  // also: what is written to may still be read
    if (start >= n) {
        if (threadIdx.x == 0 && token == 0) write_levels(levels, written, steps);
        return;
    }
    rotated(columns, inputs + (long long)token * n, minus, n, start, size, block);
    const int tiles = tiles_of(n), halves = halves_of(n);
    const int room = tiles * RECORD_BYTES(4);  // of four tokens
    u8* const own = operand + (long long)(token / 4) * room;
    for (int tile = threadIdx.x / 32; tile < size / TILE; tile += blockDim.x / 32) {
        const int index = start / TILE + tile;
        if (index >= tiles) break;
        const int W = 2 * index + 2 <= halves ? 4 : 2, half = 16 * W;
        // Word: columns c, c + half, c + 1, c + 1 + half.
        const int c = 2 * lane, t = c / (4 * W), step = c % (4 * W) / 4;
        const int places[4] = {c, c + half, c + 1, c + 1 + half};
        float x[4], y[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int column = index * TILE + places[k];
            const bool inside = c < half && column < n;
            x[k] = inside ? columns[place(tile * TILE + places[k])] : 0.f;
            y[k] = inside ? x[k] * from_half(factors[tile * TILE + places[k]]) : 0.f;
        }
        u32 words[4];
        const float x_unit = integers(x, &words[0], &words[1]), y_unit = integers(y, &words[2], &words[3]);
        u8* const record = own + index * RECORD_BYTES(4);
        if (lane == 0)
            ((float2*)(record + 64 * W * COLUMNS))[token % 4] = make_float2(x_unit, y_unit);
        if (c >= half) continue;
#pragma unroll
        for (int kind = 0; kind < 2; kind++) {
            u8* const at = record + ((kind * (W / 2) + step / 2) * COLUMNS + 2 * (token % 4)) * 64 + t * 16 +
                           step % 2 * 8 + c % 4 * 2;
            *(u32*)at = words[2 * kind];
            *(u32*)(at + 64) = words[2 * kind + 1];
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- product

// Of the warps that share a span.
__device__ __forceinline__ void meet(int span) {
    if (ROW_WARPS == 1) __syncwarp();
    else barrier<32 * ROW_WARPS>(1 + span);
}

#define PLANES (SIGN_PLANE ? 2 : 1)
#define STAGE_BYTES (FRAGMENTS * 2 * PLANES * 512)  // of a warp's tiles; 16 bytes per lane, row and plane
#define OPERAND_BYTES (QUADS * RECORD_BYTES(4))

// What a lane has of a tile: of rows g and g + 8 of every fragment, and of the operand.
template <int W>
struct Piece {
    u32 low[FRAGMENTS][2][W], signs[FRAGMENTS][2][SIGN_PLANE ? W : 1];
    u32 operand[QUADS][2][W / 2][4];
    half_bits scales[FRAGMENTS][2];
    float units[QUADS][2];
};

struct Place {
    const u8* rows[FRAGMENTS][2];
    int in_tile[FRAGMENTS][2];
    const u8* operand;
    int lane, row_warp, tiles;
};

// A lane's words of a tile, which nobody else reads.
template <int W>
__device__ __forceinline__ void fetch_tile(u8* stage, const Place& place, int tile) {
    const int t = place.lane % 4;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const u8* const from = place.rows[f][r] + tile * tile_bytes(4);
            u8* const to = stage + (f * 2 + r) * PLANES * 512 + place.lane * 16;
            fetch<4 * W>(to, from + low_offset(W, place.in_tile[f][r], t));
            if (SIGN_PLANE) fetch<4 * W>(to + 512, from + sign_offset(W, place.in_tile[f][r]));
        }
}

// A warp's part of the records of a tile.
template <int W>
__device__ __forceinline__ void fetch_operand(u8* stage, const Place& place, int tile) {
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        const u8* const from = place.operand + (q * place.tiles + tile) * RECORD_BYTES(4);
#pragma unroll
        for (int k = 0; k < RECORD_BYTES(W); k += 512 * ROW_WARPS) {
            const int at = k + (place.row_warp * 32 + place.lane) * 16;
            if (at < RECORD_BYTES(W)) fetch<16>(stage + q * RECORD_BYTES(4) + at, from + at);
        }
    }
}

template <int COUNT>
__device__ __forceinline__ void read_words(u32* words, const u8* from) {
    if (COUNT == 4) {
        const uint4 read = *(const uint4*)from;
        words[0] = read.x, words[1] = read.y, words[2] = read.z, words[3] = read.w;
    } else {
        const uint2 read = *(const uint2*)from;
        words[0] = read.x, words[1] = read.y;
    }
}

template <int W>
__device__ __forceinline__ void read(
    Piece<W>& piece, const u8* tiles, const u8* records, const half_bits* scales, int span, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        const u8* const record = records + q * RECORD_BYTES(4);
#pragma unroll
        for (int kind = 0; kind < 2; kind++) {
#pragma unroll
            for (int s = 0; s < W / 2; s++)
                read_words<4>(
                    piece.operand[q][kind][s],
                    record + ((kind * (W / 2) + s) * COLUMNS + g % COLUMNS) * 64 + t * 16);
        }
        const float2 units = ((const float2*)(record + 64 * W * COLUMNS))[t];
        piece.units[q][0] = units.x, piece.units[q][1] = units.y;
    }
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            piece.scales[f][r] = scales[(16 * f + 8 * r + g) * span];
            const u8* const from = tiles + (f * 2 + r) * PLANES * 512 + lane * 16;
            read_words<W>(piece.low[f][r], from);
            if (SIGN_PLANE) read_words<W>(piece.signs[f][r], from + 512);
        }
}

// One table's part of 16 rows and 32 columns, with all tokens.
template <int W, typename Lookup>
__device__ __forceinline__ void add(
    int (*sums)[4], const Piece<W>& piece, int kind, int step, const Selectors* lower, Lookup lookup) {
    const u32 a[4] = {
        lookup(lower[0]), lookup(lower[1]), lookup(upper(lower[0])), lookup(upper(lower[1])),
    };
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        const u32* const b = piece.operand[q][kind][step / 2] + step % 2 * 2;
        if (step == 0) multiply_first(sums[q], a, b[0], b[1], MAGIC);
        else multiply_next(sums[q], a, b[0], b[1]);
    }
}

// Float of a sum minus another, exactly.
__device__ __forceinline__ float apart(int first, int second) { return __int_as_float(first) - __int_as_float(second); }

// 256 hi + lo of a row's difference of two sums.
__device__ __forceinline__ float joined(const int* first, const int* second, int r) {
    return fmaf(256.f, apart(first[2 * r], second[2 * r]), apart(first[2 * r + 1], second[2 * r + 1]));
}

template <int W>
__device__ __forceinline__ void multiply_tile(
    float (*kept)[QUADS][2], float (*back)[QUADS][2], const Piece<W>& piece, const Levels& levels, int t) {
    enum { P_HIGH, P_LOW, P_BACK, N_HIGH, N_LOW, N_BACK, PARTS };
    auto high = [&](Selectors s) { return look_up(levels.high, s); };
    auto low = [&](Selectors s) { return look_up(levels.low, s); };
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
        int sums[PARTS][QUADS][4];
#pragma unroll
        for (int i = 0; i < W; i++) {
            Selectors plus[2], minus[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const u32 signs = piece.signs[f][r][SIGN_PLANE ? i : 0];
                plus[r] = selectors(piece.low[f][r][i], signs, t);
                minus[r] = turned(piece.low[f][r][i], signs, t);
            }
            add<W>(sums[P_HIGH], piece, 0, i, plus, high);
            if (FINE) add<W>(sums[P_LOW], piece, 0, i, plus, low);
            add<W>(sums[P_BACK], piece, 1, i, plus, background);
            add<W>(sums[N_HIGH], piece, 0, i, minus, high);
            if (FINE) add<W>(sums[N_LOW], piece, 0, i, minus, low);
            add<W>(sums[N_BACK], piece, 1, i, minus, background);
        }
#pragma unroll
        for (int q = 0; q < QUADS; q++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float sum = joined(sums[P_HIGH][q], sums[N_HIGH][q], r);
                if (FINE) sum = fmaf(128.f, sum, joined(sums[P_LOW][q], sums[N_LOW][q], r));
                kept[f][q][r] = fmaf(sum, from_half(piece.scales[f][r]) * piece.units[q][0], kept[f][q][r]);
                back[f][q][r] = fmaf(joined(sums[P_BACK][q], sums[N_BACK][q], r), piece.units[q][1], back[f][q][r]);
            }
    }
}

// Grid: groups of BLOCK_ROWS rows. `span`: the most tiles that a warp has.
extern "C" __global__ void __launch_bounds__(32 * K_WARPS * ROW_WARPS, BLOCKS) matvec(
    const u8* symbols, const half_bits* scales, const half_bits* left, const u8* operand, const Levels* written,
    scalar* outputs, int m, int n, int tokens, int span) {
    extern __shared__ uint4 memory[];
    u8* const shared = (u8*)memory;
    start_next();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row_warp = warp % ROW_WARPS, k_warp = warp / ROW_WARPS;
    const int first = blockIdx.x * BLOCK_ROWS + row_warp * ROWS;
    const int tiles = tiles_of(n), halves = halves_of(n), whole = halves / 2;
    const int groups = (tiles + TILES_PER_GROUP - 1) / TILES_PER_GROUP;
    u8* const records = shared + k_warp * DEPTH * OPERAND_BYTES;
    u8* const ring = shared + K_WARPS * DEPTH * OPERAND_BYTES + warp * DEPTH * STAGE_BYTES;
    half_bits* const own_scales =
        (half_bits*)(shared + K_WARPS * DEPTH * (OPERAND_BYTES + ROW_WARPS * STAGE_BYTES)) + warp * ROWS * span;
    Place place;
    place.operand = operand, place.lane = lane, place.row_warp = row_warp, place.tiles = tiles;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = min(first + 16 * f + 8 * r + g, m - 1);  // those behind the last are not written
            place.rows[f][r] = symbols + (long long)(row / 4) * halves * tile_bytes(2);
            place.in_tile[f][r] = row % 4;
        }
    // The tiles of a warp: its share of the whole ones, the half one to the last.
    const int begin = whole * k_warp / K_WARPS, end = whole * (k_warp + 1) / K_WARPS;
    const bool odd = halves % 2 && k_warp == K_WARPS - 1;
#pragma unroll
    for (int d = 0; d < DEPTH - 1; d++)
        if (begin + d < end) fetch_tile<4>(ring + d * STAGE_BYTES, place, begin + d);
    for (int k = lane; k < end - begin + odd; k += 32) {
        half_bits found[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; row++)
            found[row] = __ldg(scales + (long long)min(first + row, m - 1) * groups + (begin + k) / TILES_PER_GROUP);
#pragma unroll
        for (int row = 0; row < ROWS; row++) own_scales[row * span + k] = found[row];
    }
    wait_for_previous();
#pragma unroll
    for (int d = 0; d < DEPTH - 1; d++) {
        if (begin + d < end) fetch_operand<4>(records + d * OPERAND_BYTES, place, begin + d);
        close_stage();
    }
    const Levels levels = *written;
    float kept[FRAGMENTS][QUADS][2] = {}, back[FRAGMENTS][QUADS][2] = {};
    int stage = 0, free = DEPTH - 1;
    for (int tile = begin; tile < end; tile++) {
        Piece<4> piece;
        wait_for_stages<DEPTH - 2>();
        meet(k_warp);
        read(piece, ring + stage * STAGE_BYTES, records + stage * OPERAND_BYTES, own_scales + tile - begin, span, lane);
        if (tile + DEPTH - 1 < end) {  // what all have read before they met
            fetch_tile<4>(ring + free * STAGE_BYTES, place, tile + DEPTH - 1);
            fetch_operand<4>(records + free * OPERAND_BYTES, place, tile + DEPTH - 1);
        }
        close_stage();
        free = stage;
        stage = stage + 1 == DEPTH ? 0 : stage + 1;
        multiply_tile(kept, back, piece, levels, t);
    }
    if (odd) {
        Piece<2> piece;
        wait_for_all();
        meet(k_warp);
        fetch_tile<2>(ring, place, whole);
        fetch_operand<2>(records, place, whole);
        wait_for_all();
        meet(k_warp);
        read(piece, ring, records, own_scales + whole - begin, span, lane);
        multiply_tile(kept, back, piece, levels, t);
    }
    __syncthreads();
    float* const partial = (float*)shared;  // [K_WARPS][TOKENS][BLOCK_ROWS]
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
        for (int q = 0; q < QUADS; q++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = 16 * f + 8 * r + g, token = 4 * q + t;
                if (token >= TOKENS) continue;
                const float u = from_half(left[min(first + row, m - 1)]);
                partial[(k_warp * TOKENS + token) * BLOCK_ROWS + row_warp * ROWS + row] =
                    kept[f][q][r] * levels.unit + u * back[f][q][r];
            }
    __syncthreads();
    for (int k = threadIdx.x; k < BLOCK_ROWS * TOKENS; k += blockDim.x) {
        const int row = blockIdx.x * BLOCK_ROWS + k % BLOCK_ROWS, token = k / BLOCK_ROWS;
        if (row >= m || token >= tokens) continue;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < K_WARPS; w++) sum += partial[w * TOKENS * BLOCK_ROWS + k];
        outputs[(long long)token * m + row] = narrow(sum);
    }
}

// ---------------------------------------------------------------------------------------------------------- unpacking

// Four neighbouring numbers; a row whose width is no multiple of four is written one by one.
__device__ __forceinline__ void write_four(scalar* to, const float* values, int count, bool aligned) {
    if (aligned && count >= 4) {
#if TYPE == 0
        *(float4*)to = make_float4(values[0], values[1], values[2], values[3]);
#else
        ushort4 four;
        four.x = narrow(values[0]), four.y = narrow(values[1]), four.z = narrow(values[2]), four.w = narrow(values[3]);
        *(ushort4*)to = four;
#endif
        return;
    }
    for (int k = 0; k < 4 && k < count; k++) to[k] = narrow(values[k]);
}

// Rows begin ... of the matrix for rotated inputs. Grid: rows; words of eight symbols in a row, sixteen per tile.
extern "C" __global__ void unpack(
    const u8* symbols, const half_bits* scales, const half_bits* levels, const half_bits* left, const half_bits* right,
    scalar* outputs, int n, int begin) {
    __shared__ float magnitudes[16];
    const int count = (1 << (BITS - 1)) - 1;
    if (threadIdx.x < 16) magnitudes[threadIdx.x] =
        threadIdx.x && threadIdx.x <= count ? from_half(levels[threadIdx.x - 1]) : 0.f;
    __syncthreads();
    const int tiles = tiles_of(n), halves = halves_of(n);
    const int index = blockIdx.y * blockDim.x + threadIdx.x, word = index % 16, tile = index / 16;
    if (tile >= tiles) return;
    const int W = 2 * tile + 2 <= halves ? 4 : 2, row = begin + blockIdx.x, t = word / W, i = word % W;
    if (t >= 4) return;
    const u8* const from = symbols + (long long)(row / 4) * halves * tile_bytes(2) + tile * tile_bytes(4);
    const u32 low = __ldg((const u32*)(from + low_offset(W, row % 4, t)) + i);
    const u32 signs = SIGN_PLANE ? __ldg((const u32*)(from + sign_offset(W, row % 4)) + i) : 0;
    const int groups = (tiles + TILES_PER_GROUP - 1) / TILES_PER_GROUP;
    const float scale = from_half(scales[(long long)row * groups + tile / TILES_PER_GROUP]), u = from_half(left[row]);
    scalar* const to = outputs + (long long)blockIdx.x * n;
    const u32 sign = signs << (3 - t), nibbles = selectors(low, signs, t).low;
#pragma unroll
    for (int part = 0; part < 2; part++) {  // columns c ... c + 3, and those w/2 behind them
        const int column = tile * TILE + 4 * W * t + 4 * i + part * 16 * W;
        float values[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int at = 8 * k + 4 * part;
            const u32 nibble = nibbles >> at & 15, code = WIDE_INDEX ? low >> at & 15 : nibble & 7;
            const float v = column + k < n ? from_half(__ldg(right + column + k)) : 0.f;
            const float size = code ? magnitudes[code] * scale : u * v;
            values[k] = (WIDE_INDEX ? sign >> at >> 3 & 1 : nibble >> 3) ? -size : size;
        }
        write_four(to + column, values, n - column, n % 4 == 0);
    }
}
