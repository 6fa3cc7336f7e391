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
//   Entries, entries(a, b, s, u)      the table of floats: s a + u b
//   entry<P>(Entries, Index, i, v)    Floats of lanes kLanes i ... of the 32 columns
//   swap(Floats, s)                   lanes whose numbers differ in bit s change places
#pragma once

#include "kernels.h"

namespace {

constexpr int64_t kChunk = 32;  // columns whose symbols are looked up together
constexpr int64_t kChunks = kTileColumns / kChunk;
constexpr int kTable = 32;
constexpr float kLargestLevel = 32767.0f;

// --- Tiles ---------------------------------------------------------------------------------------------------------

constexpr int low_bits(int bits) { return bits < 4 ? 2 : 4; }
constexpr int64_t tile_bytes(int bits) { return kTileRows * kTileColumns * bits / 8; }
// Bytes of a row of a tile in the low plane and in the top one.
constexpr int64_t low_stride(int bits) { return kTileColumns * low_bits(bits) / 8; }
constexpr int64_t kTopStride = kTileColumns / 8;

// One plane of Q bits of a tile of half the width, as that of a whole tile with symbols 0 in the second half: field f of
// byte k is column f * bytes + k, where a row of the whole tile has twice the bytes.
template <int Q>
void widen_plane(const uint8_t* half, uint8_t* whole) {
    constexpr int64_t kBytes = kWordBits * Q / 8;
    constexpr unsigned kMask = (1u << Q) - 1;
    for (int64_t r = 0; r < kTileRows; ++r) {
        for (int64_t k = 0; k < kBytes; ++k) {
            const unsigned byte = half[r * kBytes + k];
            unsigned even = 0, odd = 0;
            for (int f = 0; f < 4 / Q; ++f) {
                even |= (byte >> (2 * f * Q) & kMask) << (f * Q);
                odd |= (byte >> ((2 * f + 1) * Q) & kMask) << (f * Q);
            }
            whole[2 * r * kBytes + k] = static_cast<uint8_t>(even);
            whole[(2 * r + 1) * kBytes + k] = static_cast<uint8_t>(odd);
        }
    }
}

// Four rows of the weight, tile by tile.
template <int P>
struct TileReader {
    const uint8_t* first;
    int64_t whole;  // tiles of full width
    uint8_t last[tile_bytes(P)];

    TileReader(const SlabSymbols& weight, int64_t row) {
        const int64_t words = (weight.columns + kWordBits - 1) / kWordBits;
        first = weight.symbols + row * words * (kWordBits * P / 8);
        whole = words / 2;
        if (words % 2 == 0) return;
        const uint8_t* half = first + whole * tile_bytes(P);
        widen_plane<low_bits(P)>(half, last);
        if (P % 2 == 1) widen_plane<1>(half + kTileRows * low_stride(P) / 2, last + kTileRows * low_stride(P));
    }

    const uint8_t* tile(int64_t t) const { return t < whole ? first + t * tile_bytes(P) : last; }

    // Tiles follow each other, also from rows to rows: one stream, and the hardware only needs help at pages.
    void fetch(int64_t t) const {
        const uint8_t* ahead = first + t * tile_bytes(P) + kBytesAhead;
        for (int64_t line = 0; line < tile_bytes(P); line += 64) __builtin_prefetch(ahead + line);
    }
};

template <class Isa, int P>
typename Isa::Symbols load_row(const uint8_t* tile, int64_t r) {
    return Isa::template load<P>(tile + r * low_stride(P), tile + kTileRows * low_stride(P) + r * kTopStride);
}

inline float half_at(const uint16_t* halves, int64_t at) { return to_float(Half{halves[at]}); }

inline int64_t groups_of(const SlabSymbols& weight) {
    return (weight.columns + weight.group_size - 1) / weight.group_size;
}

// Entries by symbol, repeated: levels with their signs, 0 for the background, and the signs of the background.
struct Alphabet {
    float level[kTable], background[kTable];

    explicit Alphabet(const SlabSymbols& weight) {
        const int top = 1 << (weight.bits - 1);
        for (int k = 0; k < kTable; ++k) {
            const int c = k & (top - 1);
            const float sign = k & top ? -1.0f : 1.0f;
            level[k] = c == 0 ? 0.0f : sign * half_at(weight.levels, c - 1);
            background[k] = c == 0 ? sign : 0.0f;
        }
    }

    float largest() const {
        float top = 0.0f;
        for (float a : level) top = a > top ? a : top;
        return top;
    }
};

// The primitives in plain C++, over the floats of an instruction set that has nothing better.
template <class Base>
struct PlainSymbols : Base {
    using Floats = typename Base::Floats;
    using Base::load;
    static constexpr float kBackgroundUnit = 1.0f;
    static constexpr bool kWholeTiles = false;
    static constexpr int quick_rows(int) { return 1; }
    static int64_t group(int64_t g) { return g; }

    struct Symbols {
        const uint8_t *low, *top;
    };
    struct Index {
        uint8_t lane[kChunk];
    };
    struct Tables {
        int16_t level[kTable], background[kTable];
    };
    struct Shorts {
        int16_t lane[kChunk];
    };
    struct Sums {
        int32_t lane[8];
    };
    struct Entries {
        float lane[kTable];
    };

    template <int P>
    static Symbols load(const uint8_t* low, const uint8_t* top) {
        return {low, top};
    }
    template <int P>
    static Index index(const Symbols& symbols, int64_t h) {
        constexpr int Q = low_bits(P);
        Index out;
        for (int64_t k = 0; k < kChunk; ++k) {
            const int64_t column = h * kChunk + k;
            unsigned symbol = symbols.low[column % low_stride(P)] >> (column / low_stride(P) * Q) & ((1u << Q) - 1);
            if (P % 2 == 1) symbol |= (symbols.top[column % kTopStride] >> (column / kTopStride) & 1u) << Q;
            out.lane[k] = static_cast<uint8_t>(symbol);
        }
        return out;
    }
    static Tables tables(const int16_t* levels, const int16_t* backgrounds) {
        Tables out;
        memcpy(out.level, levels, sizeof out.level);
        memcpy(out.background, backgrounds, sizeof out.background);
        return out;
    }
    static Shorts look_up(const int16_t* table, const Index& index) {
        Shorts out;
        for (int64_t k = 0; k < kChunk; ++k) out.lane[k] = table[index.lane[k]];
        return out;
    }
    template <int P>
    static Shorts levels(const Tables& tables, const Index& index) {
        return look_up(tables.level, index);
    }
    template <int P>
    static Shorts backgrounds(const Tables& tables, const Index& index) {
        return look_up(tables.background, index);
    }
    static Sums no_sums() { return {}; }
    static Sums dot(Sums sums, const Shorts& a, const int16_t* x) {
        for (int64_t k = 0; k < kChunk; ++k) sums.lane[k % 8] += a.lane[k] * x[k];
        return sums;
    }
    static Floats to_floats(const Sums& sums) {
        static_assert(Base::kLanes == 8);
        float out[8];
        for (int i = 0; i < 8; ++i) out[i] = static_cast<float>(sums.lane[i]);
        return Base::load(out);
    }
    static Entries entries(const float* levels, const float* backgrounds, float s, float u) {
        Entries out;
        for (int k = 0; k < kTable; ++k) out.lane[k] = levels[k] * s + backgrounds[k] * u;
        return out;
    }
    template <int P>
    static Floats entry(const Entries& table, const Index& index, int64_t i, Floats right) {
        float v[Base::kLanes];
        Base::save(right, v);
        for (int64_t k = 0; k < Base::kLanes; ++k) {
            const uint8_t symbol = index.lane[i * Base::kLanes + k];
            v[k] = symbol % (1 << (P - 1)) == 0 ? table.lane[symbol] * v[k] : table.lane[symbol];
        }
        return Base::load(v);
    }
    static Floats swap(Floats a, int s) {
        float in[Base::kLanes], out[Base::kLanes];
        Base::save(a, in);
        for (int i = 0; i < Base::kLanes; ++i) out[i] = in[i ^ s];
        return Base::load(out);
    }
};

// --- Rotation ------------------------------------------------------------------------------------------------------

inline uint64_t splitmix64(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

inline void turn_signs(float* x, int64_t columns, uint64_t seed) {
    for (int64_t j = 0; j < columns; ++j) {
        const uint32_t sign = static_cast<uint32_t>(splitmix64(seed, static_cast<uint64_t>(j)) >> 32) & 0x80000000u;
        x[j] = as_float(as_bits(x[j]) ^ sign);
    }
}

// Steps within a vector: p + q and p - q are both p' + sign * p, where p' is the other one of the pair.
template <class Isa>
void transform_lanes(float* x, int64_t columns, int64_t block, float factor) {
    float signs[4][Isa::kLanes];
    int steps = 0;
    for (int64_t s = 1; s < block && s < Isa::kLanes; s *= 2, ++steps) {
        for (int64_t i = 0; i < Isa::kLanes; ++i) signs[steps][i] = i & s ? -1.0f : 1.0f;
    }
    const auto scale = Isa::broadcast(factor);
    for (int64_t j = 0; j < columns; j += Isa::kLanes) {
        auto lanes = Isa::load(x + j);
        for (int step = 0; step < steps; ++step) {
            lanes = Isa::fma(lanes, Isa::load(signs[step]), Isa::swap(lanes, 1 << step));
        }
        Isa::save(Isa::mul(lanes, scale), x + j);
    }
}

// The Hadamard transform of each block, in place. `x` may be read and written up to a multiple of kLanes; what stands
// behind the columns must be 0.
template <class Isa>
void transform(float* x, int64_t columns, int64_t block) {
    transform_lanes<Isa>(x, columns, block, 1.0f / __builtin_sqrtf(static_cast<float>(block)));
    for (int64_t step = Isa::kLanes; step < block; step *= 2) {
        for (int64_t start = 0; start < columns; start += 2 * step) {
            for (int64_t j = start; j < start + step; j += Isa::kLanes) {
                const auto p = Isa::load(x + j), q = Isa::load(x + j + step);
                Isa::save(Isa::add(p, q), x + j);
                Isa::save(Isa::fma(q, Isa::broadcast(-1.0f), p), x + j + step);
            }
        }
    }
}

template <class Isa>
void rotate(float* x, int64_t columns, int64_t block, uint64_t seed, bool restore) {
    if (!restore) turn_signs(x, columns, seed);
    transform<Isa>(x, columns, block);
    if (restore) turn_signs(x, columns, seed);
}

// --- Inputs --------------------------------------------------------------------------------------------------------

inline bool all_finite(const float* x, int64_t count) {
    uint32_t top = 0;
    for (int64_t j = 0; j < count; ++j) {
        const uint32_t magnitude = as_bits(x[j]) & 0x7FFFFFFFu;
        top = magnitude > top ? magnitude : top;
    }
    return is_finite(as_float(top));
}

inline void fill_groups(const SlabSymbols& weight, SymbolActivations& act) {
    const int64_t last = groups_of(weight) - 1;
    for (int64_t w = 0; w < 2 * act.tiles; ++w) {
        const int64_t group = w * kWordBits / weight.group_size;
        act.groups[w] = group < last ? group : last;
    }
}

// Returns whether fixed point can stand for the token.
template <class Isa>
bool prepare_quick(SymbolActivations& act, int64_t token, float level_unit) {
    const int64_t padded = act.tiles * kTileColumns;
    bool finite = true;
    for (int64_t t = 0; t < act.tiles; ++t) {
        const int64_t at = token * padded + t * kTileColumns, scale = token * act.tiles + t;
        const float *x = act.x + at, *v = act.right + t * kTileColumns;
        float z[kTileColumns];
        for (int64_t j = 0; j < kTileColumns; ++j) z[j] = v[j] * x[j];
        act.x_scales[scale] = to_fixed_point<kTileColumns>(x, Isa::group, act.x16 + at) * level_unit;
        act.z_scales[scale] = to_fixed_point<kTileColumns>(z, Isa::group, act.z16 + at) / Isa::kBackgroundUnit;
        finite &= is_finite(act.x_scales[scale]) && is_finite(act.z_scales[scale]);
    }
    return finite;
}

template <class Isa>
Suits prepare_symbols(const SlabSymbols& weight, const void* inputs, int32_t input_type, int64_t tokens, bool quick,
                      SymbolActivations& act) {
    const int64_t padded = act.tiles * kTileColumns, n = weight.columns;
    const float level_unit = Alphabet(weight).largest() / kLargestLevel;
    fill_groups(weight, act);
    to_floats(reinterpret_cast<const Half*>(weight.right), n, padded, act.right);
    for (int64_t token = 0; token < act.tokens; ++token) {
        float* x = act.x + token * padded;
        read_token(inputs, input_type, token * n, token < tokens ? n : 0, padded, x);
        if (weight.block != 0) {
            rotate<Isa>(x, n, weight.block, weight.seed, false);
            if (!all_finite(x, n)) return Suits::kNeither;
        }
        quick = quick && prepare_quick<Isa>(act, token, level_unit);
    }
    return quick ? Suits::kQuick : Suits::kExact;
}

// --- Entries as floats ---------------------------------------------------------------------------------------------

// Calls take(column, entries) for all lanes of one row, from left to right.
template <class Isa, int P, class Take>
void each_entry(const SlabSymbols& weight, const Alphabet& alphabet, const TileReader<P>& reader, const float* right,
                const int64_t* groups, int64_t tiles, int64_t row, const Take& take) {
    const uint16_t* scales = weight.scales + row * groups_of(weight);
    const float u = half_at(weight.left, row);
    for (int64_t t = 0; t < tiles; ++t) {
        const auto symbols = load_row<Isa, P>(reader.tile(t), row % kTileRows);
        typename Isa::Entries table;
        UNROLLED for (int64_t h = 0; h < kChunks; ++h) {
            if (h % 2 == 0) {
                const float s = half_at(scales, groups[2 * t + h / 2]);
                table = Isa::entries(alphabet.level, alphabet.background, s, u);
            }
            const auto index = Isa::template index<P>(symbols, h);
            UNROLLED for (int64_t i = 0; i < kChunk / Isa::kLanes; ++i) {
                const int64_t column = t * kTileColumns + h * kChunk + i * Isa::kLanes;
                take(column, Isa::template entry<P>(table, index, i, Isa::load(right + column)));
            }
        }
    }
}

template <class Isa, int P, int T>
void exact_symbol_rows(const SlabSymbols& weight, const SymbolActivations& act, const Output& output, int64_t begin,
                       int64_t end) {
    const Alphabet alphabet(weight);
    const int64_t padded = act.tiles * kTileColumns;
    for (int64_t four = begin; four < end; four += kTileRows) {
        const TileReader<P> reader(weight, four);
        for (int64_t row = four; row < end && row < four + kTileRows; ++row) {
            typename Isa::Floats sum[T];
            for (int t = 0; t < T; ++t) sum[t] = Isa::zero();
            each_entry<Isa>(weight, alphabet, reader, act.right, act.groups, act.tiles, row,
                            [&](int64_t column, const typename Isa::Floats& entries) {
                                for (int t = 0; t < T; ++t) {
                                    sum[t] = Isa::fma(entries, Isa::load(act.x + t * padded + column), sum[t]);
                                }
                            });
            for (int t = 0; t < T; ++t) store(output, weight.rows, row, t, Isa::total(sum[t]));
        }
    }
}

template <class Isa, int P, class Out>
void unpack_symbol_rows(const SlabSymbols& weight, int64_t begin, int64_t end, Out* output) {
    const Alphabet alphabet(weight);
    const int64_t n = weight.columns, lanes = Isa::kLanes;
    for (int64_t four = begin; four < end; four += kTileRows) {
        const TileReader<P> reader(weight, four);
        for (int64_t row = four; row < end && row < four + kTileRows; ++row, output += n) {
            const uint16_t* scales = weight.scales + row * groups_of(weight);
            const float u = half_at(weight.left, row);
            for (int64_t start = 0; start < n; start += kChunk) {
                const auto symbols = load_row<Isa, P>(reader.tile(start / kTileColumns), row % kTileRows);
                const float s = half_at(scales, start / weight.group_size);
                const auto table = Isa::entries(alphabet.level, alphabet.background, s, u);
                float v[kChunk];
                const int64_t left = n - start < kChunk ? n - start : kChunk;
                to_floats(reinterpret_cast<const Half*>(weight.right) + start, left, kChunk, v);
                Out chunk[kChunk];
                const auto index = Isa::template index<P>(symbols, start % kTileColumns / kChunk);
                UNROLLED for (int64_t i = 0; i < kChunk / Isa::kLanes; ++i) {
                    Isa::save(Isa::template entry<P>(table, index, i, Isa::load(v + i * lanes)), chunk + i * lanes);
                }
                memcpy(output + start, chunk, sizeof(Out) * static_cast<size_t>(left));
            }
        }
    }
}

// --- Fixed-point activations ---------------------------------------------------------------------------------------

// Tiles whose scales are converted together, and room for as many groups and a vector more.
constexpr int64_t kBlockTiles = 16;
constexpr int64_t kBlockGroups = 2 * kBlockTiles + 16;

// Scales of one row from group `first` on, `count` of them, as floats.
template <class Isa>
void convert_scales(const SlabSymbols& weight, int64_t row, int64_t first, int64_t count, float* out) {
    const int64_t at = row * groups_of(weight) + first, there = weight.rows * groups_of(weight) - at;
    const Half* from = reinterpret_cast<const Half*>(weight.scales) + at;
    for (int64_t g = 0; g < count; g += Isa::kLanes) {
        Half last[Isa::kLanes] = {};
        const bool whole = g + Isa::kLanes <= there;
        if (!whole) memcpy(last, from + g, sizeof(Half) * static_cast<size_t>(there - g));
        Isa::save(Isa::expand(whole ? from + g : last, Isa::kLaneMask), out + g);
    }
}

// Sums of R rows and T tokens, in lanes.
template <class Isa, int T, int R>
struct QuickSums {
    typename Isa::Floats levels[R][T], background[R][T];
};

// R rows of one tile from row r on. Sums of products are chains of slow instructions, so the rows take turns. Split: both
// halves of the tile have scales of their own. `scales` has those of each row, of the halves at groups[0] and groups[1].
template <class Isa, int P, bool Split, int T, int R>
void add_quick_tile(const typename Isa::Tables& tables, const uint8_t* tile, int64_t r, const SymbolActivations& act,
                    int64_t t, const float (&scales)[R][kBlockGroups], const int64_t (&groups)[2],
                    QuickSums<Isa, T, R>& sums) {
    constexpr int kParts = Split ? 2 : 1;
    const int64_t padded = act.tiles * kTileColumns;
    typename Isa::Symbols symbols[R];
    typename Isa::Sums levels[R][kParts][T], background[R][T];
    UNROLLED for (int i = 0; i < R; ++i) {
        symbols[i] = load_row<Isa, P>(tile, r + i);
        UNROLLED for (int token = 0; token < T; ++token) {
            UNROLLED for (int part = 0; part < kParts; ++part) levels[i][part][token] = Isa::no_sums();
            background[i][token] = Isa::no_sums();
        }
    }
    UNROLLED for (int64_t h = 0; h < kChunks; ++h) {
        const int64_t column = t * kTileColumns + h * kChunk, part = Split ? h / 2 : 0;
        UNROLLED for (int i = 0; i < R; ++i) {
            const auto index = Isa::template index<P>(symbols[i], h);
            const auto a = Isa::template levels<P>(tables, index);
            const auto b = Isa::template backgrounds<P>(tables, index);
            UNROLLED for (int token = 0; token < T; ++token) {
                const int64_t at = token * padded + column;
                levels[i][part][token] = Isa::dot(levels[i][part][token], a, act.x16 + at);
                background[i][token] = Isa::dot(background[i][token], b, act.z16 + at);
            }
        }
    }
    UNROLLED for (int token = 0; token < T; ++token) {
        const auto scale = Isa::broadcast(act.x_scales[token * act.tiles + t]);
        const auto low = Isa::broadcast(act.z_scales[token * act.tiles + t]);
        UNROLLED for (int i = 0; i < R; ++i) {
            UNROLLED for (int part = 0; part < kParts; ++part) {
                const auto products = Isa::mul(scale, Isa::to_floats(levels[i][part][token]));
                const auto s = Isa::broadcast(scales[i][groups[part]]);
                sums.levels[i][token] = Isa::fma(products, s, sums.levels[i][token]);
            }
            const auto signs = Isa::to_floats(background[i][token]);
            sums.background[i][token] = Isa::fma(low, signs, sums.background[i][token]);
        }
    }
}

// R rows from `row` on, or those of them before `end`; the others are computed with the last one's scales.
template <class Isa, int P, bool Split, int T, int R>
void quick_symbol_tile_rows(const SlabSymbols& weight, const TileReader<P>& reader, const typename Isa::Tables& tables,
                            const SymbolActivations& act, const Output& output, int64_t row, int64_t end) {
    QuickSums<Isa, T, R> sums;
    UNROLLED for (int r = 0; r < R; ++r) {
        UNROLLED for (int token = 0; token < T; ++token) {
            sums.levels[r][token] = sums.background[r][token] = Isa::zero();
        }
    }
    for (int64_t start = 0; start < act.tiles; start += kBlockTiles) {
        const int64_t stop = start + kBlockTiles < act.tiles ? start + kBlockTiles : act.tiles;
        const int64_t first = act.groups[2 * start], groups = act.groups[2 * stop - 1] - first + 1;
        float scales[R][kBlockGroups];
        for (int r = 0; r < R; ++r) {
            convert_scales<Isa>(weight, row + r < end ? row + r : end - 1, first, groups, scales[r]);
        }
        for (int64_t t = start; t < stop; ++t) {
            const uint8_t* tile = reader.tile(t);
            if (row % kTileRows == 0) reader.fetch(t);
            const int64_t group[2] = {act.groups[2 * t] - first, act.groups[2 * t + 1] - first};
            add_quick_tile<Isa, P, Split, T, R>(tables, tile, row % kTileRows, act, t, scales, group, sums);
        }
    }
    UNROLLED for (int r = 0; r < R; ++r) {
        if (row + r >= end) break;
        const auto u = Isa::broadcast(half_at(weight.left, row + r));
        UNROLLED for (int token = 0; token < T; ++token) {
            const auto both = Isa::fma(u, sums.background[r][token], sums.levels[r][token]);
            store(output, weight.rows, row + r, token, Isa::total(both));
        }
    }
}

template <class Isa, int P, bool Split, int T>
void quick_symbol_rows(const SlabSymbols& weight, const SymbolActivations& act, const Output& output, int64_t begin,
                       int64_t end) {
    constexpr int R = Isa::quick_rows(T);
    const Alphabet alphabet(weight);
    const float largest = alphabet.largest(), unit = largest > 0.0f ? kLargestLevel / largest : 0.0f;
    int16_t levels[kTable], background[kTable];
    for (int k = 0; k < kTable; ++k) {
        levels[k] = static_cast<int16_t>(__builtin_rintf(alphabet.level[k] * unit));
        background[k] = static_cast<int16_t>(alphabet.background[k]);
    }
    const auto tables = Isa::tables(levels, background);
    for (int64_t four = begin; four < end; four += kTileRows) {
        const TileReader<P> reader(weight, four);
        for (int64_t row = four; row < end && row < four + kTileRows; row += R) {
            quick_symbol_tile_rows<Isa, P, Split, T, R>(weight, reader, tables, act, output, row, end);
        }
    }
}

// --- Choosing the instance -----------------------------------------------------------------------------------------

template <int N>
struct Constant {
    static constexpr int value = N;
};

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
