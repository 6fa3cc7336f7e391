// The loops for weights in symbols (slablm/packing/symbols.py), as templates over a struct `Isa` of primitives.
//
// A symbol is an index into a table of 32 entries that fits into registers: shuffles of bytes, 16-bit or 32-bit lanes look
// it up. Bits above a symbol's own need no mask where the table repeats itself. Two paths, as in kernels.h:
//
//   exact: a table of floats per row and group holds +-s a and +-u; where it gave u, the entry is multiplied with v.
//   quick: tables of integers for the whole weight, one with +-a scaled to 16 bits and one with +-1 for the background, are
//          multiplied with x and with v * x in fixed point (14 bits, a scale per tile) and summed in integers over half a
//          tile or a tile. Then the row's scale s is applied; u is at the end.
//
// A last tile of half the width is rewritten as a whole one beside nothing, so that there is one layout to read.
//
// Isa offers, beside the floats and `group` of kernels.h (here for 128 columns):
//   Symbols, load<P>(low, top)        one row of a tile: its bytes in the two planes
//   Index, index<P>(Symbols, h)       symbols of columns 32 h ... of the row, h < 4
//   Tables, tables(a, b)              tables of int16 for `levels` and `backgrounds`, from 32 entries by symbol
//   Shorts, levels(Tables, Index)     32 columns as 16-bit lanes
//   Shorts, backgrounds(Tables, Index)  the same, times kBackgroundUnit
//   Sums, no_sums(), dot(Sums, Shorts, x16), to_floats(Sums)
//   kQuickTokens                      up to so many tokens, fixed point is faster than floats
//   kWholeTiles                       Sums can hold levels * x16 of 128 columns, not only of 64
//   quick_rows(T)                     rows of a tile read together with T tokens
//   totals(Floats[N], float[N])       the sum over the lanes of each of N vectors
//   Entries, entries(a, b, s, u)      the table of floats: s a + u b
//   entry<P>(Entries, Index, i, v)    Floats of lanes kLanes i ... of the 32 columns
//   swap(Floats, s)                   lanes whose numbers differ in bit s change places
#pragma once

#include "symbols_exact.h"
#include "symbols_inputs.h"
#include "symbols_quick.h"

namespace {

// Calls run with the number of bits as a constant.
template <class Run>
void for_bits(const SlabSymbols& weight, const Run& run) {
    if (weight.bits == 2) return run(Constant<2>());
    if (weight.bits == 3) return run(Constant<3>());
    if (weight.bits == 4) return run(Constant<4>());
    run(Constant<5>());
}

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

template <class Isa, int P, bool Split>
void quick_symbol_tokens(const SlabSymbols& weight, const SymbolActivations& act, const Output& out, int64_t row,
                         int64_t end) {
    if (act.tokens == 1) return quick_symbol_rows<Isa, P, Split, 1>(weight, act, out, row, end);
    if (act.tokens == 2) return quick_symbol_rows<Isa, P, Split, 2>(weight, act, out, row, end);
    quick_symbol_rows<Isa, P, Split, 4>(weight, act, out, row, end);
}

template <class Isa, int P>
void quick_symbol_groups(const SlabSymbols& weight, const SymbolActivations& act, const Output& out, int64_t row,
                         int64_t end) {
    if constexpr (Isa::kWholeTiles) {
        if (weight.group_size % kTileColumns == 0) {
            return quick_symbol_tokens<Isa, P, false>(weight, act, out, row, end);
        }
    }
    quick_symbol_tokens<Isa, P, true>(weight, act, out, row, end);
}

template <class Isa>
void quick_symbols(const SlabSymbols& weight, const SymbolActivations& act, const Output& out, int64_t row,
                   int64_t end) {
    for_bits(weight, [&](auto bits) { quick_symbol_groups<Isa, bits.value>(weight, act, out, row, end); });
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
            rotate<SymbolIsa>};
}

}  // namespace
