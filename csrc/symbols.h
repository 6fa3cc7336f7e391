// The loops for weights in symbols (slablm/packing/symbols.py), as templates over a struct `Isa` of primitives.
//
// An entry is s (u - 127.5) / 128, where u is a byte: that of its symbol, or 255 less it where the symbol of the same
// column in the row above is odd. A table of these bytes fits into registers, and byte shuffles look symbols up in it.
// Rows of a tile are read together, so the row above is at hand. Two paths, as in kernels.h:
//
//   exact: bytes become floats, those of the reference, and are multiplied or written out.
//   quick: bytes are multiplied with inputs x in fixed point (14 bits, a scale per tile) and summed in integers. They
//          start at -127.5 sum x, the same in every row; the row's s is applied to the end result.
//
// A last tile of half the width is rewritten as a whole one beside nothing, so that there is one layout to read.
//
// Isa offers, beside the floats of kernels.h:
//   kChunk                            columns that are looked up together, a divisor of 64
//   Symbols, load<P>(low, top)        one row of a tile: its bytes in the two planes
//   Index, index<P>(Symbols, h)       symbols of columns kChunk h ... of the row
//   Table, table<P>(Levels)           u by symbol
//   Bytes, look_up<P>(Table, above, own)  u of kChunk columns, from the symbols above them and their own
//   floats(Bytes, i)                  Floats of columns kLanes i ... of a chunk
//   arrange(fixed, x16)               a chunk of inputs, 14 bits each, as `dot` reads them, and twice as large
//   Sums, start(int32_t[kLanes])      integers in lanes
//   dot(Sums, Bytes, x16)             adds the products of a chunk
//   all(u)                            Bytes that are all the same
//   save(Sums, int32_t[kLanes]), to_floats(Sums)
//   kQuickTokens                      up to so many tokens, fixed point is faster than floats
//   quick_rows(T)                     rows of a tile read together with T tokens
//   totals(Floats[N], float[N])       the sum over the lanes of each of N vectors
//   swap(Floats, s)                   lanes whose numbers differ in bit s change places
//
// With 8 lanes, sums of a tile stay below 3 * 255 * 8191 * 16 < 2^27.
#pragma once

#include "prompt_attention.h"
#include "symbols_batch.h"
#include "symbols_exact.h"
#include "symbols_inputs.h"
#include "symbols_quick.h"

namespace {

template <class Isa, int P>
void exact_symbol_tokens(const SlabSymbols& weight, const SymbolActivations& act, const Output& out, int64_t row,
                         int64_t end) {
    if (act.tokens == 1) return exact_symbol_rows<Isa, P, 1>(weight, act, out, row, end);
    if (act.tokens == 2) return exact_symbol_rows<Isa, P, 2>(weight, act, out, row, end);
    if (act.tokens == 4) return exact_symbol_rows<Isa, P, 4>(weight, act, out, row, end);
    exact_symbol_rows<Isa, P, 8>(weight, act, out, row, end);
}

template <class Isa>
void exact_symbols(const SlabSymbols& weight, const SymbolActivations& act, const Output& out, int64_t row,
                   int64_t end) {
    for_bits(weight, [&](auto bits) { exact_symbol_tokens<Isa, bits.value>(weight, act, out, row, end); });
}

template <class Isa, int P>
void quick_symbol_tokens(const SlabSymbols& weight, const SymbolActivations& act, const Output& out, int64_t row,
                         int64_t end) {
    if (act.tokens == 1) return quick_symbol_rows<Isa, P, 1>(weight, act, out, row, end);
    if (act.tokens == 2) return quick_symbol_rows<Isa, P, 2>(weight, act, out, row, end);
    quick_symbol_rows<Isa, P, 4>(weight, act, out, row, end);
}

template <class Isa>
void quick_symbols(const SlabSymbols& weight, const SymbolActivations& act, const Output& out, int64_t row,
                   int64_t end) {
    for_bits(weight, [&](auto bits) { quick_symbol_tokens<Isa, bits.value>(weight, act, out, row, end); });
}

template <class Isa>
void unpack_symbols(const SlabSymbols& weight, int64_t begin, int64_t end, void* output, int32_t output_type) {
    for_bits(weight, [&](auto bits) {
        if (output_type == kFloat32) {
            unpack_symbol_rows<Isa, bits.value>(weight, begin, end, static_cast<float*>(output));
        } else {
            unpack_symbol_rows<Isa, bits.value>(weight, begin, end, static_cast<BFloat*>(output));
        }
    });
}

template <class Isa, class SymbolIsa>
constexpr Kernels kernels_of() {
    static_assert(Isa::kQuickTokens <= 4 && SymbolIsa::kQuickTokens <= 4);
    return {Isa::kQuickTokens,
            prepare<Isa>,
            exact<Isa>,
            quick<Isa>,
            dense<Isa>,
            unpack<Isa>,
            SymbolIsa::kQuickTokens,
            prepare_symbols<SymbolIsa>,
            exact_symbols<SymbolIsa>,
            quick_symbols<SymbolIsa>,
            unpack_symbols<SymbolIsa>,
            rotate<SymbolIsa>,
            SymbolIsa::kBatchTokens,
            prepare_batch<SymbolIsa>,
            batch_symbols<SymbolIsa>,
            normalize<SymbolIsa>,
            attend<SymbolIsa>,
            attend_many<SymbolIsa>,
            piece_numbers,
            activate<SymbolIsa>};
}

}  // namespace
