// Kernels for symbols: rows as numbers. See symbols_device.cuh.

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
    const u8* symbols, const half_bits* scales, const signed char* levels, scalar* outputs, int n, int begin) {
    __shared__ float values[LEVELS];
    if (threadIdx.x < LEVELS) values[threadIdx.x] = (levels[threadIdx.x] + 0.5f) / 128;
    __syncthreads();
    const int halves = halves_of(n), index = blockIdx.y * blockDim.x + threadIdx.x;
    const int tile = index / 16, W = 2 * tile + 2 <= halves ? 4 : 2, t = index % 16 / W, i = index % 16 % W;
    if (tile >= tiles_of(n) || t >= 4) return;
    const int row = begin + blockIdx.x, above = (row + 3) % 4;
    const u8* const from = symbols + (long long)(row / 4) * halves * tile_bytes(2) + tile * tile_bytes(4);
    const u32 low = __ldg((const u32*)(from + low_offset(W, row % 4, t)) + i);
    const u32 top = TOP_BITS ? __ldg((const u32*)(from + top_offset(W, row % 4, t)) + i) : 0;
    const u32 own = nibbles(low, top, t), upper = BITS == 6 ? fields(top, t) : BITS == 5 ? top >> t & 0x11111111u : 0;
    const u32 minus = nibbles(__ldg((const u32*)(from + low_offset(W, above, t)) + i), 0, t);
    const float scale = from_half(scales[row]);
    scalar* const to = outputs + (long long)blockIdx.x * n;
#pragma unroll
    for (int part = 0; part < 2; part++) {  // columns c ... c + 3, and those w/2 behind them
        const int column = tile * TILE + 4 * W * t + 4 * i + part * 16 * W;
        float numbers[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int at = 8 * k + 4 * part;
            const float size = scale * values[(own >> at & 15) | (upper >> at & 3) << 4];
            numbers[k] = minus >> at & 1 ? -size : size;
        }
        write_four(to + column, numbers, n - column, n % 4 == 0);
    }
}
