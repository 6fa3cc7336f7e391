// A block of columns in a sweep, each entry of which becomes the nearest value of an alphabet: what
// slablm/methods/nearest_columns.py says, for NVRTC, and for a C++ compiler that tests it without a GPU.
//
// Rows do not know of each other, so a thread has one. All is transposed, [columns, rows]: neighbouring threads read
// neighbouring addresses. A thread goes through its row in pieces of PIECE columns, which it holds in registers. First
// it makes up for the errors of all columns before the piece, with the coefficients from shared memory, where threads of
// a block read the same address at once; then it settles the piece column by column.

#ifdef __CUDACC__
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED
extern "C" float fabsf(float);
extern "C" float fmaxf(float, float);
extern "C" float copysignf(float, float);
#endif

constexpr int PIECE = 16;
constexpr int MOST_LEVELS = 15;
constexpr float SMALLEST_NORMAL = 1.17549435e-38f;

struct Block {
    const float* current;       // [columns, rows]
    const float* before;        // [columns, rows], or null: the current weights
    const float* coefficients;  // [columns, columns]
    const float* divisors;      // [columns]
    const float* left;          // [rows]
    const float* right;         // [columns]
    const float* scales;        // [groups, rows]
    const long long* groups;    // [columns]
    const float* levels;        // [level_count], ascending
    float* fresh;               // [columns, rows], written
    float* errors;              // [columns, rows], written
    int rows, columns, level_count;
};

struct Levels {
    float values[MOST_LEVELS], between[MOST_LEVELS - 1];
};

// Those that are missing are once more the last one, which changes no choice.
static Levels levels_of(const Block& block) {
    Levels levels;
    UNROLLED for (int c = 0; c < MOST_LEVELS; ++c)
        levels.values[c] = block.levels[c < block.level_count ? c : block.level_count - 1];
    UNROLLED for (int c = 0; c + 1 < MOST_LEVELS; ++c)
        levels.between[c] = (levels.values[c + 1] + levels.values[c]) / 2;
    return levels;
}

static float nearest(float value, float background, float scale, const Levels& levels) {
    const float size = fabsf(value), relative = size / fmaxf(scale, SMALLEST_NORMAL);
    float level = levels.values[0];
    UNROLLED for (int c = 0; c + 1 < MOST_LEVELS; ++c)
        level = levels.between[c] < relative ? levels.values[c + 1] : level;
    const float kept = level * scale;
    return copysignf(fabsf(kept - size) < fabsf(background - size) ? kept : background, value);
}

// Coefficients of all columns up to the end of a piece for those in it, [first + PIECE, PIECE]; above the diagonal only.
static void fill(float* piece, const Block& block, int first, int thread, int threads) {
    for (int at = thread; at < (first + PIECE) * PIECE; at += threads) {
        const int j = at / PIECE, l = first + at % PIECE;
        piece[at] = j < l && l < block.columns ? block.coefficients[j * block.columns + l] : 0;
    }
}

// Settles columns first to first + PIECE of one row; those before are settled.
static void settle(const Block& block, const Levels& levels, const float* piece, int first, int row) {
    const long long rows = block.rows;
    float value[PIECE], before[PIECE], background[PIECE], scale[PIECE], divisor[PIECE];
    UNROLLED for (int k = 0; k < PIECE; ++k) {
        const int l = first + k < block.columns ? first + k : block.columns - 1;
        value[k] = block.current[l * rows + row];
        before[k] = block.before ? block.before[l * rows + row] : 0;
        background[k] = block.left[row] * block.right[l];
        scale[k] = block.scales[block.groups[l] * rows + row];
        divisor[k] = block.divisors[l];
    }
    // PIECE errors at a time are on their way from memory while others are made up for.
    for (int start = 0; start < first; start += PIECE) {
        float error[PIECE];
        UNROLLED for (int k = 0; k < PIECE; ++k) error[k] = block.errors[(start + k) * rows + row];
        UNROLLED for (int j = 0; j < PIECE; ++j)
            UNROLLED for (int k = 0; k < PIECE; ++k) value[k] -= piece[(start + j) * PIECE + k] * error[j];
    }
    UNROLLED for (int k = 0; k < PIECE; ++k) {
        if (first + k < block.columns) {
            const float fresh = nearest(value[k], background[k], scale[k], levels);
            const float error = ((block.before ? before[k] : value[k]) - fresh) / divisor[k];
            UNROLLED for (int later = k + 1; later < PIECE; ++later)
                value[later] -= piece[(first + k) * PIECE + later] * error;
            block.fresh[(first + k) * rows + row] = fresh;
            block.errors[(first + k) * rows + row] = error;
        }
    }
}

#ifdef __CUDACC__

// Dynamic shared memory: what `fill` writes for the last piece.
extern "C" __global__ void nearest_columns(Block block) {
    extern __shared__ __align__(16) float piece[];
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    const Levels levels = levels_of(block);
    for (int first = 0; first < block.columns; first += PIECE) {
        __syncthreads();
        fill(piece, block, first, threadIdx.x, blockDim.x);
        __syncthreads();
        if (row < block.rows) settle(block, levels, piece, first, row);
    }
}

#else

extern "C" void nearest_columns(Block block) {
    float* piece = new float[(block.columns + PIECE) * PIECE];
    const Levels levels = levels_of(block);
    for (int first = 0; first < block.columns; first += PIECE) {
        fill(piece, block, first, 0, 1);
        for (int row = 0; row < block.rows; ++row) settle(block, levels, piece, first, row);
    }
    delete[] piece;
}

#endif
