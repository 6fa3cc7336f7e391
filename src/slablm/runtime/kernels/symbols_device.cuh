// Weights in symbols on NVIDIA GPUs, as in slablm/runtime/kernels/gpu_symbols.py, where the constants in capitals and
// the text of symbols_decode.cuh come from.
//
// A few tokens. `quantize` turns inputs, once rotated, into 16-bit integers with a unit per token and tile: x = 256 hi
// + lo, two bytes. `matvec` multiplies them, byte by byte on tensor cores (m16n8k32): 16 rows of a weight in registers,
// and hi and lo of 4 tokens as the 8 columns of the other factor. With v the bytes of a row, of a tile of columns
//
//     Σ τ (q + ½) x = Σ v x + ½ Σ x = 256 Σ v hi + Σ v lo + ½ Σ x.
//
// The first two terms are below 2^30 together, an integer of 32 bits. The last is the same in all rows, and added once.
// The scale of a row comes at the end.
//
// An operand has a record per tile and four tokens: for each token the unit over 128, and that times ½ Σ x; then its
// bytes in the order in which lanes read them, [half of the steps][column of the fragment][t][16 bytes].
//
// A warp has eight tiles of rows, 32 rows, in two fragments: rows g and g + 8 of the first are rows 0 and 1 of tile g,
// and those of the second its rows 2 and 3. So a lane has all rows of a tile, and the symbols above each. The K_WARPS
// of a block have the same rows and each a span of columns; in the end the sums of all spans are added. Tiles and
// records come to shared memory some tiles ahead, in a ring of DEPTH stages.

#define ROWS 32
#define QUADS ((TOKENS + 3) / 4)
#define COLUMNS (TOKENS >= 4 ? 8 : TOKENS >= 2 ? 4 : 2)
#define TILE 128
#define UNIT_BYTES 32
#define RECORD_BYTES (UNIT_BYTES + TILE * COLUMNS)
#define OPERAND_BYTES (QUADS * RECORD_BYTES)  // of a tile

// Single instructions. Tests without a GPU have their own in C++, and compile all the rest as it is.
#ifdef __CUDACC__
// 16 bytes from global to shared memory, without registers and without waiting.
__device__ __forceinline__ void fetch(u8* to, const u8* from) {
    const u32 address = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void close_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// For all stages that were closed but the last `LEFT`.
template <int LEFT>
__device__ __forceinline__ void wait_for_stages() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
__device__ __forceinline__ void wait_for_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 16 x 32 times 32 x 8 bytes with signs: sums that start anew, and that go on.
__device__ __forceinline__ void multiply_first(int* sums, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
}
__device__ __forceinline__ void multiply_next(int* sums, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

__device__ __forceinline__ int tiles_of(int n) { return (n + TILE - 1) / TILE; }
__device__ __forceinline__ int halves_of(int n) { return (n + TILE / 2 - 1) / (TILE / 2); }
