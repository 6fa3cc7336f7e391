// Products of the inputs of a layer with themselves, while a model is compressed: G += X'X of bfloat16 numbers.
//
// Inputs are packed first: 48 columns are a panel, and a word holds what one column has of two tokens that follow each
// other. vdpbf16ps multiplies both halves of 16 words and adds the products to 16 float32 sums.
#pragma once

#include <stdint.h>

constexpr int64_t kPanelColumns = 48;

struct GramPanels {
    int64_t columns, pairs;  // of X, and of its tokens
    uint32_t* packed;        // [panels, pairs, kPanelColumns], filled up with 0
};

// What one translation unit provides for it.
struct GramKernels {
    // Panels [begin, end) of rows [tokens, columns].
    void (*pack)(const uint16_t* rows, int64_t tokens, int64_t begin, int64_t end, const GramPanels& panels);
    // Adds what pairs [begin, end) give of the product of two panels to gram, [columns, columns].
    void (*multiply)(const GramPanels& panels, int64_t left, int64_t right, int64_t begin, int64_t end, float* gram);
};

extern const GramKernels kAvx512Gram;
