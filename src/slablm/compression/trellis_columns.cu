// A block of columns in a sweep, in which the four entries of every tile become what is nearest to them together: what
// slablm/methods/trellis.py says, for NVRTC. BITS of a symbol, p, are defined in front of this text.
//
// Tiles do not know of each other; of a tile each of four neighbouring threads has a row. All is transposed, [columns,
// rows]: neighbouring threads read neighbouring addresses. A thread goes through its row in pieces of PIECE columns,
// which it holds in registers. First it makes up for the errors of all columns before the piece, with the coefficients
// from shared memory, where threads of a block read the same address at once. Then it settles the piece, column by
// column:
//
// - It looks for the nearest levels of either parity to its number, and to minus it, by counting the numbers halfway
//   between neighbours that lie below. Times the row's scale, these are the same in all columns and stay in registers.
// - The threads of a tile tell each other the four distances of each. With d₀ to d₃ as in trellis.py, two rows make
//
//       t(π₃, π₁) = min over π₀ of  d₀(π₃, π₀) + d₁(π₀, π₁),      u(π₁, π₃) = min over π₂ of  d₂(π₁, π₂) + d₃(π₂, π₃)
//
//   and of the four sums t(π₃, π₁) + u(π₁, π₃) the least is the best way. All threads of a tile find it by the same
//   steps, so they agree, also on which of equally near ways it is.
//
// Rows that the last tile lacks have threads too, whose symbols are 0; they read and write nothing.

constexpr int PIECE = 16;
constexpr int TILE_ROWS = 4;
constexpr int LEVELS = 1 << BITS;
constexpr int OF_ONE_PARITY = LEVELS / 2;

struct Block {
    const float* current;       // [columns, rows]
    const float* before;        // [columns, rows], or null: the current weights
    const float* coefficients;  // [columns, columns]
    const float* divisors;      // [columns]
    const float* scales;        // [rows]
    const float* levels;        // [LEVELS], those of either parity ascending
    unsigned char* codes;       // [columns, rows], written
    float* fresh;               // [columns, rows], written
    float* errors;              // [columns, rows], written
    long long rows;
    int columns;
};

struct Row {
    long long index;
    bool present;
    float scale;
    const float* levels;                  // in shared memory
    float halfway[2][OF_ONE_PARITY - 1];  // between levels of each parity, times the scale
};

struct Entry {
    float value;
    int code;
};

// Of two neighbouring rows: the distance by way of the better parity of the first, and that parity.
struct Pair {
    float distance;
    int parity;
};

__device__ __forceinline__ float infinity() { return __int_as_float(0x7F800000); }

__device__ __forceinline__ Row row_of(const Block& block, const float* levels, long long index) {
    Row row = {index, index < block.rows, 0, levels, {}};
    if (row.present) row.scale = block.scales[index];
#pragma unroll
    for (int parity = 0; parity < 2; parity++)
#pragma unroll
        for (int c = 0; c + 1 < OF_ONE_PARITY; c++)
            row.halfway[parity][c] = (levels[2 * c + 2 + parity] + levels[2 * c + parity]) / 2 * row.scale;
    return row;
}

// Coefficients of all columns up to the end of a piece for those in it, [first + PIECE, PIECE]; 0 below the diagonal.
__device__ __forceinline__ void fill(float* piece, const Block& block, int first) {
    for (int at = threadIdx.x; at < (first + PIECE) * PIECE; at += blockDim.x) {
        const int j = at / PIECE, l = first + at % PIECE;
        piece[at] = j < l && l < block.columns ? block.coefficients[j * block.columns + l] : 0;
    }
}

// The index of the nearest level among those of one parity.
__device__ __forceinline__ int nearest(const float* halfway, float target) {
    int index = 0;
#pragma unroll
    for (int c = 0; c + 1 < OF_ONE_PARITY; c++) index += halfway[c] < target;
    return index;
}

// Of two rows, by the parity above the first and that of the second; distances: [parity above][parity].
__device__ __forceinline__ Pair better(const float first[2][2], const float second[2][2], int above, int below) {
    const float even = first[above][0] + second[0][below], odd = first[above][1] + second[1][below];
    return {fminf(even, odd), odd < even};
}

// The parities of the four rows on the best way, a bit each; distances: [row][parity above][parity].
__device__ __forceinline__ int best_way(const float distances[TILE_ROWS][2][2]) {
    float least = infinity();
    int way = 0;
#pragma unroll
    for (int second = 0; second < 2; second++)
#pragma unroll
        for (int fourth = 0; fourth < 2; fourth++) {
            const Pair upper = better(distances[0], distances[1], fourth, second);
            const Pair lower = better(distances[2], distances[3], second, fourth);
            const float distance = upper.distance + lower.distance;
            way = distance < least ? upper.parity | second << 1 | lower.parity << 2 | fourth << 3 : way;
            least = fminf(distance, least);
        }
    return way;
}

// Written so that no register is indexed by what is known only when it runs.
template <typename T>
__device__ __forceinline__ T chosen(const T of_each[2][2], bool above, bool parity) {
    const T even = above ? of_each[1][0] : of_each[0][0], odd = above ? of_each[1][1] : of_each[0][1];
    return parity ? odd : even;
}

// What an entry becomes together with the others of its tile. All threads of a warp must come here.
__device__ __forceinline__ Entry settled(const Row& row, float target) {
    Entry entries[2][2];
    float distances[TILE_ROWS][2][2];
#pragma unroll
    for (int above = 0; above < 2; above++)
#pragma unroll
        for (int parity = 0; parity < 2; parity++) {
            const int code = 2 * nearest(row.halfway[parity], above ? -target : target) + parity;
            const float level = row.levels[code], value = (above ? -level : level) * row.scale;
            const float distance = (value - target) * (value - target);
            const float own = row.present ? distance : parity ? infinity() : 0;
            entries[above][parity] = {value, code};
#pragma unroll
            for (int r = 0; r < TILE_ROWS; r++) distances[r][above][parity] = __shfl_sync(~0u, own, r, TILE_ROWS);
        }
    const int way = best_way(distances), place = threadIdx.x % TILE_ROWS;
    return chosen(entries, way >> (place + TILE_ROWS - 1) % TILE_ROWS & 1, way >> place & 1);
}

// Settles columns first to first + PIECE of one row; those before are settled.
__device__ __forceinline__ void settle(const Block& block, const Row& row, const float* piece, int first) {
    float value[PIECE], before[PIECE], divisor[PIECE];
#pragma unroll
    for (int k = 0; k < PIECE; k++) {
        const bool inside = row.present && first + k < block.columns;
        const long long at = (first + k) * block.rows + row.index;
        value[k] = inside ? block.current[at] : 0;
        before[k] = inside && block.before ? block.before[at] : 0;
        divisor[k] = inside ? block.divisors[first + k] : 1;
    }
    // PIECE errors at a time are on their way from memory while others are made up for.
    for (int start = 0; start < first; start += PIECE) {
        float error[PIECE];
#pragma unroll
        for (int k = 0; k < PIECE; k++) error[k] = row.present ? block.errors[(start + k) * block.rows + row.index] : 0;
#pragma unroll
        for (int j = 0; j < PIECE; j++)
#pragma unroll
            for (int k = 0; k < PIECE; k++) value[k] -= piece[(start + j) * PIECE + k] * error[j];
    }
#pragma unroll
    for (int k = 0; k < PIECE; k++) {
        if (first + k < block.columns) {
            const Entry entry = settled(row, value[k]);
            const float error = ((block.before ? before[k] : value[k]) - entry.value) / divisor[k];
#pragma unroll
            for (int later = k + 1; later < PIECE; later++) value[later] -= piece[(first + k) * PIECE + later] * error;
            if (row.present) {
                const long long at = (first + k) * block.rows + row.index;
                block.codes[at] = entry.code;
                block.fresh[at] = entry.value;
                block.errors[at] = error;
            }
        }
    }
}

// Dynamic shared memory: what `fill` writes for the last piece.
extern "C" __global__ void trellis_columns(Block block) {
    extern __shared__ uint4 memory[];
    __shared__ float levels[LEVELS];
    float* const piece = (float*)memory;
    for (int c = threadIdx.x; c < LEVELS; c += blockDim.x) levels[c] = block.levels[c];
    __syncthreads();
    const Row row = row_of(block, levels, (long long)blockIdx.x * blockDim.x + threadIdx.x);
    for (int first = 0; first < block.columns; first += PIECE) {
        __syncthreads();
        fill(piece, block, first);
        __syncthreads();
        settle(block, row, piece, first);
    }
}
