// The C interface of the kernels: what Python calls through ctypes, and what one instruction set offers the runtime.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define SLABLM_API extern "C" __declspec(dllexport)
#else
#define SLABLM_API extern "C" __attribute__((visibility("default")))
#endif

// Changes whenever a struct or a signature below does; Python refuses a library with another number.
constexpr int32_t kAbiVersion = 8;

constexpr int64_t kWordBits = 64;      // columns per plane word, and per activation scale
constexpr int64_t kMaxTokens = 8;      // tokens of one decode call
constexpr int64_t kMaxQuickRank = 8;   // largest rank with fixed-point activations
constexpr int64_t kPadding = 64;       // bytes that may be read after the last value
constexpr int64_t kTileRows = 4;       // rows and columns of a tile of symbols
constexpr int64_t kBatchRows = 32;      // that become bytes together, for many tokens
constexpr int64_t kTileColumns = 128;
constexpr int64_t kMostLanes = 16;     // of a vector of floats
constexpr int32_t kNotFinite = 1;      // what is returned if inputs have an infinity or NaN and nothing was computed
constexpr int32_t kNoKernel = 2;

enum ScalarType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3 };
enum InstructionSet : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3, kInstructionSets = 4 };

// A weight in runtime layout. Row i, column j:
//   bit j % 64 of planes[(i * words + j / 64) * plane_count] is set where the entry is kept;
//   the same bit of the next word (plane_count = 2) is set where the entry is -(sum of u v), never at a kept one;
//   kept entries of row i are values[i * kept ...] in column order, times scales[i] if the values are int8.
struct SlabWeight {
    int64_t rows, columns, kept, rank;
    int32_t value_type;   // kFloat16, kBFloat16 or kInt8
    int32_t plane_count;  // 1: positions, 2: positions and signs, interleaved word by word
    const void* values;   // kPadding readable bytes follow the last one
    const float* scales;  // [rows] for int8 values, else null
    const uint64_t* planes;  // [rows, words, plane_count]
    const float* left;    // u, [rows, rank]
    const float* right;   // v, [rank, 64 * words], filled up with 0
};

// A weight in symbols as a file holds it: tiles as in slablm/packing/tiles.py.
struct SlabSymbols {
    int64_t rows, columns;
    int64_t block;           // of the rotation of the inputs, a power of two that divides `columns`; 0: none
    uint64_t seed;           // of the rotation's signs
    int64_t bits;            // of a symbol, 2 to 6
    const uint8_t* symbols;
    const uint16_t* scales;  // [rows], FP16, finite and not negative
    const int8_t* levels;    // [2^bits]
};

SLABLM_API int32_t slablm_abi_version();

// Whether this library has the instruction set and this CPU can run it.
SLABLM_API int32_t slablm_supports(int32_t set);

// outputs[t, i] = sum over j of weight[i, j] * inputs[t, j], tokens 0 ... kMaxTokens, both row-major without gaps.
// Returns 0, or -1 if the arguments are out of range or memory is short.
SLABLM_API int32_t slablm_matvec(int32_t set, const SlabWeight* weight, const void* inputs, int32_t input_type,
                                 int64_t tokens, void* outputs, int32_t output_type, int32_t threads);

// The same for a dense weight of kFloat16, kBFloat16 or kInt8, [rows, columns] row-major without gaps. Rows of kInt8, and
// no others, have FP16 scales, [rows].
SLABLM_API int32_t slablm_dense_matvec(int32_t set, const void* weight, int32_t weight_type, const uint16_t* scales,
                                       int64_t rows, int64_t columns, const void* inputs, int32_t input_type,
                                       int64_t tokens, void* outputs, int32_t output_type, int32_t threads);

// rows [begin, end) of the weight as a dense [end - begin, columns] matrix of kFloat32 or kBFloat16.
SLABLM_API int32_t slablm_unpack(int32_t set, const SlabWeight* weight, int64_t begin, int64_t end, void* output,
                                 int32_t output_type, int32_t threads);

// As slablm_matvec. Returns kNotFinite, and computes nothing, if the weight is rotated and the rotated inputs are not all
// finite: an infinity among the inputs would be one in all columns of its block.
SLABLM_API int32_t slablm_symbols_matvec(int32_t set, const SlabSymbols* weight, const void* inputs, int32_t input_type,
                                         int64_t tokens, void* outputs, int32_t output_type, int32_t threads);

// The same for any number of tokens; kNotFinite wherever an input is not finite. Inputs are rounded to 14 bits, or to
// `input_bits` = 8 where they are rotated. Returns kNoKernel, and computes nothing, if the instruction set has none that is
// faster than unpacking.
SLABLM_API int32_t slablm_symbols_matmul(int32_t set, const SlabSymbols* weight, const void* inputs, int32_t input_type,
                                         int64_t tokens, int32_t input_bits, void* outputs, int32_t output_type,
                                         int32_t threads);

// As slablm_unpack, of the matrix for rotated inputs; `begin` must be a multiple of kTileRows.
SLABLM_API int32_t slablm_symbols_unpack(int32_t set, const SlabSymbols* weight, int64_t begin, int64_t end,
                                         void* output, int32_t output_type, int32_t threads);

// Rotates rows [count, columns] of float32 in place; with `restore`, rotates them back.
SLABLM_API int32_t slablm_rotate(int32_t set, float* rows, int64_t count, int64_t columns, int64_t block, uint64_t seed,
                                 int32_t restore);

// Numbers of a type; without data, none.
struct SlabVector {
    const void* data;
    int64_t type;
};

// x (offset + weight) / sqrt(mean of x^2 + epsilon); without a weight, x.
struct SlabNorm {
    SlabVector weight;
    double offset, epsilon;
};

struct SlabProjection {
    SlabSymbols weight;
    SlabVector bias;
};

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1 };

// A decoder block of a transformer; `hidden` and `head_dim` are multiples of kMostLanes.
//
//   h = inputs + norm(o attention(q, k, v)),   q, k, v of norm(inputs), q and k normed by head and turned by position
//   outputs = h + norm(down (f(gate) * up)),   gate, up of norm(h)
struct SlabBlock {
    int64_t hidden, intermediate, heads, kv_heads, head_dim;
    Activation activation;
    double scaling;  // of the products of q and k
    SlabNorm attention_norm, attention_out_norm, mlp_norm, mlp_out_norm, query_norm, key_norm;
    SlabProjection query, key, value, attention_out;  // without rows, key and value follow query in the same weight
    SlabProjection gate, up, down;                    // so up follows gate
};

// One new token of each of a few sequences.
struct SlabStep {
    int64_t sequences;  // up to kMaxTokens
    const void* inputs;  // [sequences, hidden]
    void* outputs;  // of every block, [blocks, sequences, hidden]
    int64_t type;  // of both
    const void *cosines, *sines;  // [sequences, rotary_dim], or one row for all
    int64_t rotary_type, rotary_dim, rotary_stride;  // stride from sequence to sequence
    const uint8_t* mask;  // of the tokens with attention, 0 where there is none; or null
    int64_t mask_stride;  // from sequence to sequence
};

// Where a block's keys and values are: heads of [capacity, head_dim] without gaps.
struct SlabPlace {
    void *keys, *values;
    int64_t type, sequence_stride, head_stride;  // strides in numbers
    int64_t first, slot;  // attention is from token `first` of the cache on; the new one is written to `slot`
};

// Runs so many blocks, one behind the other. Returns 0; kNotFinite, with nothing of use in the outputs and in the slots
// of the caches; or -1 if the arguments are out of range or memory is short.
SLABLM_API int32_t slablm_blocks(int32_t set, const SlabBlock* blocks, const SlabPlace* places, int64_t count,
                                 const SlabStep* step, int32_t threads);

// Many tokens of a few sequences, which have as many each.
struct SlabPrompt {
    int64_t sequences, tokens;
    const void* inputs;           // [sequences, tokens, hidden]
    int64_t type;                 // of inputs, outputs, and new keys and values
    const void *cosines, *sines;  // [sequences, tokens, rotary_dim], or one of these for all
    int64_t rotary_type, rotary_dim, rotary_stride;  // stride from sequence to sequence
    int64_t input_bits;           // of products, as of slablm_symbols_matmul
    float* queries;               // [sequences, heads, tokens, head_dim]
};

// Keys and values of all tokens that there are: heads of [length, head_dim] without gaps.
struct SlabContext {
    const void *keys, *values;
    int64_t type, sequence_stride, head_stride, length;  // strides in numbers
    const uint8_t* mask;  // [sequences, tokens, length], 0 where there is no attention; null: to all up to the token itself
    int64_t mask_stride;  // from sequence to sequence
};

// The block up to its cache: writes the queries, and new keys and values, [sequences, kv_heads, tokens, head_dim]. Returns 0;
// kNotFinite; kNoKernel, where slablm_symbols_matmul has none; or -1 as slablm_blocks.
SLABLM_API int32_t slablm_prompt_heads(int32_t set, const SlabBlock* block, const SlabPrompt* prompt, void* keys,
                                       void* values, int32_t threads);

// The rest of the block, with the queries that are there: writes outputs like the inputs.
SLABLM_API int32_t slablm_prompt_outputs(int32_t set, const SlabBlock* block, const SlabPrompt* prompt,
                                         const SlabContext* context, void* outputs, int32_t threads);

// Activations of one call as the kernels read them: columns filled up with 0 to 64 * words.
struct Activations {
    int64_t tokens;         // a power of two; missing tokens are 0
    float* x;               // [tokens, padded]
    int16_t* x16;           // quick: x in fixed point, [tokens, padded], columns in the instruction set's order
    float* x_scales;        // quick: [tokens, words]
    int16_t* z16;           // quick: v_q * x likewise, [rank, tokens, padded]
    float* z_scales;        // quick: [rank, tokens, words]
};

// Inputs of one call for a weight in symbols: columns filled up with 0 to whole tiles.
struct SymbolActivations {
    int64_t tokens;   // a power of two; missing tokens are 0
    int64_t tiles;    // T, across the columns; padded = 128 T
    float* x;         // [tokens, padded], rotated
    int16_t* x16;     // quick: x in fixed point, [tokens, padded], arranged by the instruction set
    int32_t* starts;  // quick: where sums of products with bytes start, [tokens, T, lanes]
    float* x_scales;  // quick: of these sums, [tokens, T]
};

// Inputs of many tokens likewise, in fixed point only.
struct BatchActivations {
    int64_t tokens;    // a multiple of those that are multiplied together; missing tokens are 0
    int64_t padded;    // columns, filled up with 0 to whole tiles
    int64_t segment;   // columns with the same scale, whole tiles
    int64_t segments;
    int64_t planes;    // of bytes: 1 (8 bits) or 2 (14 bits)
    int8_t* x;         // [tokens, planes * padded], arranged by the instruction set
    int32_t* starts;   // of sums of products with bytes, [tokens, segments]
    float* scales;     // [tokens, segments]
};

enum class Suits { kExact, kQuick, kNeither };

struct Output {
    void* data;      // [tokens, rows]
    int64_t tokens;  // tokens to store, at most those of the activations
    int32_t type;
};

// One head of attention for one token.
struct AttentionHead {
    const float* query;  // [head_dim]
    const void *keys, *values;  // [tokens, head_dim]
    int64_t cache_type, tokens, head_dim;
    float scaling;
    const uint8_t* mask;  // [tokens] or null
    float* scores;        // [tokens rounded up to kMostLanes], scratch
    float* output;        // [head_dim]
};

// A few heads that share keys and values, for the queries of some tokens.
struct AttentionPiece {
    const float* queries;  // [heads, tokens, head_dim], of which [first, first + count) are meant
    int64_t query_stride, heads, first, count;  // stride from head to head
    const void *keys, *values;                  // [length, head_dim]
    int64_t cache_type, length, head_dim;
    float scaling;
    const uint8_t* mask;  // [tokens, length], or null: each token sees those up to itself
    float* output;        // [count, heads * head_dim]
    int64_t output_stride;  // from token to token
    float* memory;          // `piece_numbers` of them
};

// What one translation unit, compiled for one instruction set, provides.
struct Kernels {
    int64_t quick_tokens;  // with int8 values and up to so many tokens, `quick` is the faster path
    // Returns whether the inputs suit `quick`, if that is asked for; `exact` takes them all.
    bool (*prepare)(const SlabWeight& weight, const void* inputs, int32_t input_type, int64_t tokens, bool quick,
                    Activations& activations);
    void (*exact)(const SlabWeight& weight, const Activations& activations, const Output& output, int64_t begin,
                  int64_t end);
    void (*quick)(const SlabWeight& weight, const Activations& activations, const Output& output, int64_t begin,
                  int64_t end);
    // `weight` has no planes and no scales: all entries are kept, and int8 rows have FP16 `scales`, others null.
    void (*dense)(const SlabWeight& weight, const uint16_t* scales, const Activations& activations,
                  const Output& output, int64_t begin, int64_t end);
    void (*unpack)(const SlabWeight& weight, int64_t begin, int64_t end, void* output, int32_t output_type);

    // The same for weights in symbols; rows begin at a multiple of kTileRows.
    int64_t quick_symbol_tokens;
    Suits (*prepare_symbols)(const SlabSymbols& weight, const void* inputs, int32_t input_type, int64_t tokens,
                             bool quick, SymbolActivations& activations);
    void (*exact_symbols)(const SlabSymbols& weight, const SymbolActivations& activations, const Output& output,
                          int64_t begin, int64_t end);
    void (*quick_symbols)(const SlabSymbols& weight, const SymbolActivations& activations, const Output& output,
                          int64_t begin, int64_t end);
    void (*unpack_symbols)(const SlabSymbols& weight, int64_t begin, int64_t end, void* output, int32_t output_type);
    void (*rotate)(float* row, int64_t columns, int64_t block, uint64_t seed, bool restore);
    int64_t batch_tokens;  // of one plane that are multiplied together, of two half of them; 0: no kernel for many
    bool (*prepare_batch)(const SlabSymbols& weight, const void* inputs, int32_t input_type, int64_t begin, int64_t end,
                          float* room, const BatchActivations& activations);
    void (*batch_symbols)(const SlabSymbols& weight, const BatchActivations& activations, const Output& output,
                          int64_t begin, int64_t end, uint8_t* bytes);

    // For blocks; counts are multiples of kMostLanes.
    void (*normalize)(float* x, int64_t count, const SlabNorm& norm);
    void (*attend)(const AttentionHead& head);
    void (*attend_many)(const AttentionPiece& piece);
    int64_t (*piece_numbers)(int64_t heads, int64_t count, int64_t head_dim);
    // out = f(gate) * up
    void (*activate)(Activation activation, const float* gate, const float* up, float* out, int64_t count);
};

extern const Kernels kPortableKernels, kAvx2Kernels, kAvx512Kernels, kNeonKernels;

// A block of columns that become trellis-coded symbols one after the other (slablm/methods/trellis.py). Everything is
// row-major without gaps.
struct TrellisBlock {
    int64_t rows, columns, bits;  // of a symbol, 2 to 6
    const float* current;         // [columns, rows]
    const float* before;          // [columns, rows], or null
    const float* coefficients;    // [columns, columns], transposed: row l is what moves column l
    const float* divisors;        // [columns]
    const float* scales;          // [rows]
    const float* levels;          // [2^bits]
    uint8_t* codes;               // these three are written, [columns, rows]
    float* fresh;
    float* errors;
};

constexpr int64_t kMostBatchRows = 64;  // rows that are settled together; scratch holds [columns, so many] floats

// What one translation unit provides for it: those batches of rows that begin in [begin, end), in any order.
using TrellisKernel = void (*)(const TrellisBlock& block, int64_t begin, int64_t end, float* scratch);
extern const TrellisKernel kPortableTrellis, kAvx2Trellis, kAvx512Trellis, kNeonTrellis;

// Returns 0, or -1 if the arguments are out of range or memory is short.
SLABLM_API int32_t slablm_trellis_columns(int32_t set, const TrellisBlock* block, int32_t threads);

// gram += X'X of bfloat16 rows [tokens, columns], without what is left of the diagonal's blocks of 48 columns. Both are
// row-major without gaps. Returns kNoKernel, and computes nothing, if this CPU has no instructions for it in the set.
SLABLM_API int32_t slablm_add_gram(int32_t set, const uint16_t* rows, int64_t tokens, int64_t columns, float* gram,
                                   int32_t threads);
