// Kernels for symbols: the product of a few tokens. See symbols_device.cuh.

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
