// Kernels for symbols: inputs are rotated, and made the operand of the product. See symbols_device.cuh.

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
    scalar parts[8];
};

// Eight neighbouring inputs; 0 behind the last one.
__device__ __forceinline__ void load_inputs(float* own, const scalar* from, int count) {
    Eight loaded;
    if (count >= 8 && (u64)from % 16 == 0) loaded = *(const Eight*)from;
    else
#pragma unroll
        for (int k = 0; k < 8; k++) loaded.parts[k] = k < count ? from[k] : 0;
#pragma unroll
    for (int k = 0; k < 8; k++) own[k] = widen(loaded.parts[k]);
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

// Grid: pieces of `size` columns (a multiple of a tile, and of a block of the rotation); tokens.
extern "C" __global__ void __launch_bounds__(512) quantize(
    const scalar* inputs, const u32* minus, u8* operand, int n, int size, int block) {
    extern __shared__ float columns[];
    const int start = blockIdx.x * size, token = blockIdx.y, lane = threadIdx.x % 32;
    start_next();
    wait_for_previous();  // also: what is written to may still be read
    rotated(columns, inputs + (long long)token * n, minus, n, start, size, block);
    const int tiles = tiles_of(n), halves = halves_of(n);
    for (int tile = threadIdx.x / 32; tile < size / TILE; tile += blockDim.x / 32) {
        const int index = start / TILE + tile;
        if (index >= tiles) break;
        const int W = 2 * index + 2 <= halves ? 4 : 2, half = 16 * W;
        // Word: columns c, c + half, c + 1, c + 1 + half.
        const int c = 2 * lane, t = c / (4 * W), step = c % (4 * W) / 4;
        const int places[4] = {c, c + half, c + 1, c + 1 + half};
        float values[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const bool inside = c < half && index * TILE + places[k] < n;
            values[k] = inside ? columns[place(tile * TILE + places[k])] : 0.f;
        }
        u32 words[2];
        int sum;
        const float unit = integers<1>(values, words, words + 1, sum) / 128;
        sum = __reduce_add_sync(~0u, sum);
        u8* const record = operand + index * OPERAND_BYTES + token / 4 * RECORD_BYTES;
        if (lane == 0) ((float2*)record)[token % 4] = make_float2(unit, 0.5f * sum * unit);
        if (c >= half) continue;
        const int column = step / 2 * COLUMNS + 2 * (token % 4);
        u8* const at = record + UNIT_BYTES + column * 64 + t * 16 + step % 2 * 8 + c % 4 * 2;
        *(u32*)at = words[0];
        *(u32*)(at + 64) = words[1];
    }
}
