// Rows of signed bytes, each times a scale, times a few tokens: a head in 8 bits. Behind numbers.cuh; the constants TYPE,
// TOKENS and WARPS come from slablm/runtime/kernels/gpu_int8.py.
//
// Inputs become 16-bit integers x = 256 hi + lo with a unit per token and CHUNK of columns. Every block makes them for itself,
// once, in shared memory, and has as many rows as there are for one of so many blocks. dp4a adds the products of four bytes:
//
//     Σ q x = 256 Σ q hi + Σ q lo      of 16 columns below 2^27 together.
//
// A warp has AT_ONCE rows at a time, and each lane 16 columns of every chunk of them.

#define CHUNK 512
#define AT_ONCE 4

#ifdef __CUDACC__
__device__ __forceinline__ int dot4(u32 a, u32 b, int sum) {
    asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}
#endif

__device__ __forceinline__ int dot16(const uint4& a, const uint4& b) {
    return dot4(a.w, b.w, dot4(a.z, b.z, dot4(a.y, b.y, dot4(a.x, b.x, 0))));
}

// The operand: [token][chunk][hi, lo][lane], and behind it the units, [token][chunk]. Tokens that are not there are 0.
__device__ __forceinline__ void make_operand(uint4* operand, float* units, const scalar* inputs, int n, int chunks, int tokens) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int piece = warp; piece < TOKENS * chunks; piece += WARPS) {
        const int token = piece / chunks, column = piece % chunks * CHUNK + 16 * lane;
        const scalar* const from = inputs + (long long)token * n + column;
        float values[16];
        u32 high[4], low[4];
        int sum;
#pragma unroll
        for (int k = 0; k < 16; k++) values[k] = token < tokens && column < n ? widen(from[k]) : 0.f;
        const float unit = integers<4>(values, high, low, sum);
        operand[64 * piece + lane] = {high[0], high[1], high[2], high[3]};
        operand[64 * piece + 32 + lane] = {low[0], low[1], low[2], low[3]};
        if (lane == 0) units[piece] = unit;
    }
}

// n is a multiple of 16. Grid: `blocks`.
extern "C" __global__ void __launch_bounds__(32 * WARPS) int8_rows(
    const u8* rows, const half_bits* scales, const scalar* inputs, scalar* outputs, int m, int n, int tokens, int blocks) {
    extern __shared__ uint4 memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = (n + CHUNK - 1) / CHUNK;
    float* const units = (float*)(memory + 64 * TOKENS * chunks);
    start_next();
    wait_for_previous();
    make_operand(memory, units, inputs, n, chunks, tokens);
    __syncthreads();
    for (int first = (blockIdx.x * WARPS + warp) * AT_ONCE; first < m; first += blocks * WARPS * AT_ONCE) {
        float sums[AT_ONCE][TOKENS] = {};
        const u8* from[AT_ONCE];
#pragma unroll
        for (int r = 0; r < AT_ONCE; r++) from[r] = rows + (long long)min(first + r, m - 1) * n + 16 * lane;
#pragma unroll 2
        for (int chunk = 0; chunk < chunks; chunk++) {
            uint4 q[AT_ONCE] = {};
            if (chunk * CHUNK + 16 * lane < n)
#pragma unroll
                for (int r = 0; r < AT_ONCE; r++) q[r] = __ldg((const uint4*)(from[r] + chunk * CHUNK));
#pragma unroll
            for (int token = 0; token < TOKENS; token++) {
                const int piece = token * chunks + chunk;
                const uint4 high = memory[64 * piece + lane], low = memory[64 * piece + 32 + lane];
                const float unit = units[piece];
#pragma unroll
                for (int r = 0; r < AT_ONCE; r++)
                    sums[r][token] = fmaf((float)(256 * dot16(q[r], high) + dot16(q[r], low)), unit, sums[r][token]);
            }
        }
        float own = 0.f;  // of the row and the token that this lane writes
#pragma unroll
        for (int k = 0; k < AT_ONCE * TOKENS; k++) {
            float sum = sums[k / TOKENS][k % TOKENS];
#pragma unroll
            for (int apart = 16; apart; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
            if (lane == k) own = sum;
        }
        const int row = first + lane / TOKENS, token = lane % TOKENS;
        if (lane < AT_ONCE * TOKENS && row < m && token < tokens)
            outputs[(long long)token * m + row] = narrow(own * from_half(scales[row]));
    }
}
