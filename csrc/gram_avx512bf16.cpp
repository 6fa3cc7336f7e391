// Packing and products of panels with AVX512-BF16; gram.h says what for.
//
// A tile of G, 8 rows and 48 columns, stays in 24 registers: each pair of tokens adds 3 vectors of the right panel times
// 8 words of the left one, which are spread over a vector. Products are exact in float32. The instruction takes numbers
// below 2^-126 for 0, whatever the CPU is told, and rounds to nearest; infinities and NaN are what they are in float32.
#include <immintrin.h>

#include "gram.h"

namespace {

#define UNROLLED _Pragma("GCC unroll 4")

constexpr int kLanes = 16, kRows = 8, kVectors = kPanelColumns / kLanes;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The first `count` of 16 lanes, or all.
__mmask16 first_lanes(int64_t count) {
    return count >= kLanes ? __mmask16(0xFFFF) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

__m512i widened(const uint16_t* numbers, __mmask16 lanes) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, numbers));
}

// Pairs of tokens outside, so that rows are read as they lie in memory.
void pack(const uint16_t* rows, int64_t tokens, int64_t begin, int64_t end, const GramPanels& panels) {
    for (int64_t pair = 0; pair < panels.pairs; ++pair) {
        const uint16_t* even = rows + 2 * pair * panels.columns;
        const uint16_t* odd = even + panels.columns;
        const bool alone = 2 * pair + 1 == tokens;
        for (int64_t panel = begin; panel < end; ++panel) {
            uint32_t* to = panels.packed + (panel * panels.pairs + pair) * kPanelColumns;
            UNROLLED for (int v = 0; v < kVectors; ++v) {
                const int64_t column = panel * kPanelColumns + v * kLanes;
                const __mmask16 lanes = first_lanes(panels.columns - column);
                const __m512i low = widened(even + column, lanes);
                const __m512i high = widened(odd + column, alone ? __mmask16(0) : lanes);
                _mm512_storeu_si512(to + v * kLanes, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
    }
}

// All in one piece of assembly, with registers by name: however the instruction alone was written, GCC 12 kept half of the
// sums in memory. ROW is one of the left panel's words, S its three sums.
#define ZERO(S) "vpxord %%zmm" #S ", %%zmm" #S ", %%zmm" #S "\n\t"
#define ADD(VECTOR, S) "vdpbf16ps %%zmm" #VECTOR ", %%zmm27, %%zmm" #S "\n\t"
#define ADD_ROW(ROW, S0, S1, S2) "vpbroadcastd 4*" #ROW "(%[left]), %%zmm27\n\t" ADD(24, S0) ADD(25, S1) ADD(26, S2)
#define STORE(PLACE, S) "vmovaps %%zmm" #S ", 64*" #PLACE "(%[sums])\n\t"
#define FOR_ALL(DO) \
    DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15) DO(16) DO(17) \
    DO(18) DO(19) DO(20) DO(21) DO(22) DO(23)
#define STORE_IN_PLACE(S) STORE(S, S)

// sums [kRows, kPanelColumns] = products of 8 columns of the left panel with the right one.
void multiply_tile(const uint32_t* left, const uint32_t* right, int64_t pairs, float* sums) {
    asm volatile(
        FOR_ALL(ZERO)
        "1:\n\t"
        "vmovups (%[right]), %%zmm24\n\t"
        "vmovups 64(%[right]), %%zmm25\n\t"
        "vmovups 128(%[right]), %%zmm26\n\t"
        ADD_ROW(0, 0, 1, 2) ADD_ROW(1, 3, 4, 5) ADD_ROW(2, 6, 7, 8) ADD_ROW(3, 9, 10, 11)
        ADD_ROW(4, 12, 13, 14) ADD_ROW(5, 15, 16, 17) ADD_ROW(6, 18, 19, 20) ADD_ROW(7, 21, 22, 23)
        "add %[step], %[left]\n\t"
        "add %[step], %[right]\n\t"
        "dec %[pairs]\n\t"
        "jnz 1b\n\t"
        FOR_ALL(STORE_IN_PLACE)
        : [left] "+r"(left), [right] "+r"(right), [pairs] "+r"(pairs)
        : [sums] "r"(sums), [step] "i"(kPanelColumns * sizeof(uint32_t))
        : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
          "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22",
          "xmm23", "xmm24", "xmm25", "xmm26", "xmm27");
}

// Adds a tile's sums to rows of G, as far as there are any.
void add_tile(const float* sums, int64_t rows, int64_t width, int64_t columns, float* gram) {
    for (int64_t i = 0; i < rows; ++i) {
        UNROLLED for (int v = 0; v < kVectors; ++v) {
            float* to = gram + i * columns + v * kLanes;
            const __mmask16 lanes = first_lanes(width - v * kLanes);
            const __m512 more = _mm512_load_ps(sums + i * kPanelColumns + v * kLanes);
            _mm512_mask_storeu_ps(to, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), more));
        }
    }
}

void multiply(const GramPanels& panels, int64_t left, int64_t right, int64_t begin, int64_t end, float* gram) {
    const int64_t columns = panels.columns, first_row = left * kPanelColumns, first_column = right * kPanelColumns;
    const int64_t height = smaller(kPanelColumns, columns - first_row), width = smaller(kPanelColumns, columns - first_column);
    const uint32_t* rows = panels.packed + (left * panels.pairs + begin) * kPanelColumns;
    const uint32_t* vectors = panels.packed + (right * panels.pairs + begin) * kPanelColumns;
    alignas(64) float sums[kRows * kPanelColumns];
    for (int64_t row = 0; row < height; row += kRows) {
        multiply_tile(rows + row, vectors, end - begin, sums);
        add_tile(sums, smaller(kRows, height - row), width, columns, gram + (first_row + row) * columns + first_column);
    }
}

}  // namespace

extern const GramKernels kAvx512Gram = {pack, multiply};
