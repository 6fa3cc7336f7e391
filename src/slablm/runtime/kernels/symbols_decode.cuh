// Symbols of a tile, as bytes for integer matrix instructions. The GPU and g++ (in the tests) compile the same text.
//
// An entry of a weight is τ (q + ½) s / 128 with the level q of its symbol, a byte, and the scale s of its row; τ is -1
// where the symbol above is odd (see slablm/methods/symbols.py). As -(q + ½) = ~q + ½, its byte is q, with all bits
// turned where τ is -1. The ½, the same for all entries, are added elsewhere.
//
// A tile has 4 rows of w = 32 W columns (W = 4, or 2 for half a tile); see slablm/packing/tiles.py. Four lanes t share
// it. Of every row lane t has the columns c = 4 W t … 4 W t + 4 W - 1 and those w/2 behind them. They lie in W words
// per plane, and word i becomes a word of eight nibbles, for the columns
//
//     c, w/2 + c, c + 1, w/2 + c + 1, c + 2, …        c = 4 W t + 4 i        from the lowest nibble on.
//
// The instruction prmt looks four nibbles up in a table of 8 bytes by their lower three bits. Where the fourth is set
// it gives 255 or 0, as the top bit of the byte is. So in a table of bytes 0 and 255 in turns it gives 255 for odd
// nibbles, whatever their other bits are. This mask turns the bits of the row below. (Symbols of 2 bits take the parity
// above into the index instead.) Where symbols have 4 bits and more it also chooses between two tables, of even and of
// odd symbols, in which the other three bits are looked up; the bits of the top plane choose between two or four such pairs.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef __CUDACC__
#define SHARED_CODE __device__ __forceinline__
#else
#define SHARED_CODE static inline
#endif

#define LOW_BITS (BITS >= 4 ? 4 : 2)
#define TOP_BITS (BITS - LOW_BITS)
#define LEVELS (1 << BITS)

SHARED_CODE u32 permute(u32 low, u32 high, u32 selector) {
#ifdef __CUDACC__
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
#else
    const u64 table = (u64)high << 32 | low;
    u32 result = 0;
    for (int k = 0; k < 4; k++) {
        const u32 nibble = selector >> (4 * k) & 15, byte = (u32)(table >> (8 * (nibble & 7))) & 255;
        result |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * k);
    }
    return result;
#endif
}

SHARED_CODE u32 rotate_left(u32 word, int count) {
#ifdef __CUDACC__
    return __funnelshift_l(word, word, count);
#else
    return word << (count & 31) | word >> (-count & 31);
#endif
}

// Bytes of a tile, and where lane t finds its words of a row in it.
SHARED_CODE u32 tile_bytes(int W) { return 16 * W * BITS; }
SHARED_CODE u32 low_offset(int W, int row, int t) {
    return LOW_BITS == 4 ? 16 * W * row + 4 * W * t : 8 * W * row + 4 * W * (t & 1);
}
SHARED_CODE u32 top_offset(int W, int row, int t) {
    return 16 * W * LOW_BITS + 4 * W * TOP_BITS * row + (TOP_BITS == 2 ? 4 * W * (t & 1) : 0);
}

// Of a word of a plane of 2 bits, the symbols of lane t, in nibbles.
SHARED_CODE u32 fields(u32 word, int t) { return word >> (2 * (t >> 1)) & 0x33333333u; }

// Symbols as nibbles; of 5 and 6 bits the lower four.
SHARED_CODE u32 nibbles(u32 low, u32 top, int t) {
    if (BITS >= 4) return low;
    return BITS == 2 ? fields(low, t) : fields(low, t) | (rotate_left(top, 2 - t) & 0x44444444u);
}

// The bytes of all levels. Of 2 bits a word, and one for τ = -1; of 3 bits two words; else, for every 16 symbols, two words
// of even ones and two of odd ones.
struct Table {
    u32 words[BITS == 6 ? 16 : 8];
};

// Of levels four in a word.
SHARED_CODE Table table_of(const u32* levels) {
    Table table = {};
    if (BITS <= 3) table.words[0] = levels[0], table.words[1] = BITS == 2 ? ~levels[0] : levels[1];
    else
        for (int k = 0; k < LEVELS / 8; k++) {
            u32* const words = table.words + k / 2 * 4 + k % 2;
            words[0] = permute(levels[2 * k], levels[2 * k + 1], 0x6420);
            words[2] = permute(levels[2 * k], levels[2 * k + 1], 0x7531);
        }
    return table;
}

// What is looked up for a word of a row, four nibbles at a time: selectors of a table, of the mask of odd symbols, of one of
// two results, and of one of two such halves.
struct Selectors {
    u32 index, parity, half, quarter;
};

// `above`: the nibbles of the row above.
SHARED_CODE Selectors selectors(u32 own, u32 above, u32 top, int t) {
    Selectors result = {own, own, 0, 0};
    if (BITS == 2) result.index |= above << 2 & 0x44444444u;
    if (BITS >= 4) result.index = own >> 1 & 0x77777777u;
    if (BITS == 5) result.half = (rotate_left(top, 2 - t) & 0x44444444u) | 0x32103210u;
    if (BITS == 6) {
        result.half = (fields(top, t) << 2 & 0x44444444u) | 0x32103210u;
        result.quarter = (fields(top, t) << 1 & 0x44444444u) | 0x32103210u;
    }
    return result;
}

// The upper four nibbles.
SHARED_CODE Selectors upper(Selectors s) {
    s.index >>= 16, s.parity >>= 16, s.half >>= 16, s.quarter >>= 16;
    return s;
}

// 255 where the symbol is odd.
SHARED_CODE u32 odd(Selectors s) { return permute(0xFF00FF00u, 0xFF00FF00u, s.parity); }

SHARED_CODE u32 of_pair(const u32* words, u32 index, u32 own) {
    return (permute(words[0], words[1], index) & ~own) | (permute(words[2], words[3], index) & own);
}

// Four bytes; `own` and `above` are the masks of the symbols themselves and of those above.
SHARED_CODE u32 look_up(const Table& table, Selectors s, u32 own, u32 above) {
    if (BITS == 2) return permute(table.words[0], table.words[1], s.index);
    if (BITS == 3) return permute(table.words[0], table.words[1], s.index) ^ above;
    u32 found = of_pair(table.words, s.index, own);
    if (BITS >= 5) found = permute(found, of_pair(table.words + 4, s.index, own), s.half);
    if (BITS == 6) {
        const u32 third = of_pair(table.words + 8, s.index, own), fourth = of_pair(table.words + 12, s.index, own);
        found = permute(found, permute(third, fourth, s.half), s.quarter);
    }
    return found ^ above;
}

// A word of all four rows: their bytes, of the lower and of the upper nibbles.
SHARED_CODE void decode(u32 (*bytes)[2], const Table& table, const u32* low, const u32* top, int t) {
    u32 own[4];
    for (int row = 0; row < 4; row++) own[row] = nibbles(low[row], top[row], t);
    Selectors s[4];
    for (int row = 0; row < 4; row++) s[row] = selectors(own[row], own[(row + 3) % 4], top[row], t);
    for (int part = 0; part < 2; part++) {
        u32 masks[4];
        for (int row = 0; row < 4; row++) masks[row] = odd(s[row]);
        for (int row = 0; row < 4; row++) {
            bytes[row][part] = look_up(table, s[row], masks[row], masks[(row + 3) % 4]);
            s[row] = upper(s[row]);
        }
    }
}
