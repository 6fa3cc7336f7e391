// Kernels for symbols: the product of a few tokens. See symbols_device.cuh.

// Of a tile, an odd multiple of 64 bytes, so that lanes of neighbouring tiles do not meet in one bank.
#define TILE_ROOM (64 * (BITS | 1))
#define TILES_BYTES (ROWS / 4 * TILE_ROOM)
#define STAGE_BYTES (TILES_BYTES + OPERAND_BYTES)  // of a warp

// What a lane has of a tile of columns: its words of all four rows, and of the operand.
template <int W>
struct Piece {
    u32 low[4][W], top[4][W];
    u32 operand[QUADS][W / 2][4];
    float2 units[QUADS];
};

// Sums of a lane: of the four rows with token 4 q + t, and what is the same in all rows.
struct Sums {
    float rows[QUADS][4], common[QUADS];
};

// A warp's tiles. Four lanes share one; `from` is where a lane begins.
template <int W>
__device__ __forceinline__ void fetch_tiles(u8* stage, const u8* from, int lane) {
    u8* const to = stage + lane / 4 * TILE_ROOM + lane % 4 * 16;
#pragma unroll
    for (int k = 0; k < tile_bytes(W); k += 64)
        if (k + 64 <= tile_bytes(W) || k + lane % 4 * 16 < tile_bytes(W)) fetch(to + k, from + k);
}

// The records of a tile of columns; `from` is where a lane begins.
__device__ __forceinline__ void fetch_operand(u8* stage, const u8* from, int lane) {
#pragma unroll
    for (int k = 0; k < OPERAND_BYTES; k += 512)
        if (k + 512 <= OPERAND_BYTES || k + 16 * lane < OPERAND_BYTES)
            fetch(stage + TILES_BYTES + 16 * lane + k, from + k);
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
__device__ __forceinline__ void read(Piece<W>& piece, const u8* stage, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        const u8* const record = stage + TILES_BYTES + q * RECORD_BYTES;
        piece.units[q] = ((const float2*)record)[t];
#pragma unroll
        for (int s = 0; s < W / 2; s++)
            read_words<4>(piece.operand[q][s], record + UNIT_BYTES + (s * COLUMNS + g % COLUMNS) * 64 + t * 16);
    }
#pragma unroll
    for (int row = 0; row < 4; row++) {
        read_words<W>(piece.low[row], stage + g * TILE_ROOM + low_offset(W, row, t));
        if (TOP_BITS) read_words<W>(piece.top[row], stage + g * TILE_ROOM + top_offset(W, row, t));
    }
}

template <int W>
__device__ __forceinline__ void multiply_tile(Sums& kept, const Piece<W>& piece, const Table& table, int t) {
    int sums[2][QUADS][4];
#pragma unroll
    for (int i = 0; i < W; i++) {
        u32 low[4], top[4], bytes[4][2];
#pragma unroll
        for (int row = 0; row < 4; row++) low[row] = piece.low[row][i], top[row] = TOP_BITS ? piece.top[row][i] : 0;
        decode(bytes, table, low, top, t);
#pragma unroll
        for (int f = 0; f < 2; f++) {
            const u32 a[4] = {bytes[2 * f][0], bytes[2 * f + 1][0], bytes[2 * f][1], bytes[2 * f + 1][1]};
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
                const u32* const b = piece.operand[q][i / 2] + i % 2 * 2;
                if (i == 0) multiply_first(sums[f][q], a, b[0], b[1]);
                else multiply_next(sums[f][q], a, b[0], b[1]);
            }
        }
    }
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        kept.common[q] += piece.units[q].y;
#pragma unroll
        for (int row = 0; row < 4; row++) {
            const int* const pair = sums[row / 2][q] + row % 2 * 2;  // with hi, and with lo
            kept.rows[q][row] = fmaf((float)(256 * pair[0] + pair[1]), piece.units[q].x, kept.rows[q][row]);
        }
    }
}

// Grid: groups of ROWS rows.
extern "C" __global__ void __launch_bounds__(32 * K_WARPS, BLOCKS) matvec(
    const u8* symbols, const half_bits* scales, const u32* levels, const u8* operand, scalar* outputs, int m, int n,
    int tokens) {
    extern __shared__ uint4 memory[];
    u8* const shared = (u8*)memory;
    start_next();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    const int halves = halves_of(n), whole = halves / 2;
    // The tiles of a warp: its share of the whole ones, the half one to the last.
    const int begin = whole * warp / K_WARPS, end = whole * (warp + 1) / K_WARPS;
    const int first = blockIdx.x * ROWS, own_row = first + lane;
    const int own_tile = min(first + lane / 4 * 4, m - 1) / 4;  // what is behind the last row is not written
    u8* const ring = shared + warp * DEPTH * STAGE_BYTES;
    const u8* from = symbols + (long long)own_tile * halves * tile_bytes(2) + begin * tile_bytes(4) + 16 * t;
    const u8* records = operand + begin * OPERAND_BYTES + 16 * lane;
#pragma unroll
    for (int d = 0; d < DEPTH - 1; d++, from += tile_bytes(4))
        if (begin + d < end) fetch_tiles<4>(ring + d * STAGE_BYTES, from, lane);
    const Table table = table_of(levels);
    const float scale = from_half(scales[min(own_row, m - 1)]);
    wait_for_previous();
#pragma unroll
    for (int d = 0; d < DEPTH - 1; d++, records += OPERAND_BYTES) {
        if (begin + d < end) fetch_operand(ring + d * STAGE_BYTES, records, lane);
        close_stage();
    }
    Sums kept = {};
    int stage = 0, free = (DEPTH - 1) * STAGE_BYTES;
    for (int left = end - begin; left > 0; left--) {
        Piece<4> piece;
        wait_for_stages<DEPTH - 2>();
        __syncwarp();
        read(piece, ring + stage, lane);
        if (left > DEPTH - 1) {  // what all have read before they met
            fetch_tiles<4>(ring + free, from, lane);
            fetch_operand(ring + free, records, lane);
        }
        close_stage();
        from += tile_bytes(4), records += OPERAND_BYTES;
        free = stage;
        stage = stage == (DEPTH - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES;
        multiply_tile(kept, piece, table, t);
    }
    if (halves % 2 && warp == K_WARPS - 1) {
        Piece<2> piece;
        __syncwarp();
        fetch_tiles<2>(ring, from - (DEPTH - 1) * tile_bytes(4), lane);
        fetch_operand(ring, records - (DEPTH - 1) * OPERAND_BYTES, lane);
        wait_for_all();
        __syncwarp();
        read(piece, ring, lane);
        multiply_tile(kept, piece, table, t);
    }
    __syncthreads();
    float* const partial = (float*)shared;  // [K_WARPS][TOKENS][ROWS]
#pragma unroll
    for (int q = 0; q < QUADS; q++)
#pragma unroll
        for (int row = 0; row < 4; row++)
            if (4 * q + t < TOKENS)
                partial[(warp * TOKENS + 4 * q + t) * ROWS + lane / 4 * 4 + row] = kept.rows[q][row] + kept.common[q];
    __syncthreads();
    for (int token = warp; token < tokens && own_row < m; token += K_WARPS) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < K_WARPS; w++) sum += partial[(w * TOKENS + token) * ROWS + lane];
        outputs[(long long)token * m + own_row] = narrow(sum * scale);
    }
}
