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
