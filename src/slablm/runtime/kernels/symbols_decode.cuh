// Symbols of a tile, as bytes for integer matrix instructions. The GPU and g++ (in the tests) compile the same text.
//
// A tile has 4 rows of w = 32 W columns (W = 4, or 2 for half a tile); see slablm/packing/tiles.py. Four lanes t share
// a row. Lane t has the columns c = 4 W t … 4 W t + 4 W - 1 and those w/2 behind them. They lie in W words per plane,
// and word i becomes a word of eight selectors, nibbles of 3 bits of an index with the sign above them, for the columns
//
//     c, w/2 + c, c + 1, w/2 + c + 1, c + 2, …        c = 4 W t + 4 i        from the lowest nibble on.
//
// The instruction prmt looks four nibbles up in a table of 8 bytes. Where the sign is set it copies the top bit of the
// byte instead; tables have no top bits, so it gives 0 for negative symbols, and with all signs turned 0 for positive
// ones. These two halves of a weight, P and N, are what is multiplied, W x = P x - N x: no sign is ever applied.
// Indices of 4 bits (BITS = 5) take two tables; the top bit of the index silences one or the other in the same way.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef __CUDACC__
#define SHARED_CODE __device__ __forceinline__
#else
#define SHARED_CODE static inline
#endif

#define LOW_BITS (BITS >= 4 ? 4 : 2)
#define SIGN_PLANE (BITS == 3 || BITS == 5)
#define WIDE_INDEX (BITS == 5)
#define SIGNS 0x88888888u

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

// Bytes of a tile, and where lane t finds its words of a row in it.
SHARED_CODE u32 tile_bytes(int W) { return 16 * W * BITS; }
SHARED_CODE u32 low_offset(int W, int row, int t) {
    return LOW_BITS == 4 ? 16 * W * row + 4 * W * t : 8 * W * row + 4 * W * (t & 1);
}
SHARED_CODE u32 sign_offset(int W, int row) { return 16 * W * LOW_BITS + 4 * W * row; }

// Two words of selectors; `high` is used for indices of 4 bits alone, and selects in the table of their upper half.
struct Selectors {
    u32 low, high;
};

SHARED_CODE Selectors selectors(u32 low, u32 signs, int t) {
    Selectors result;
    result.high = 0;
    if (BITS == 4) {
        result.low = low;
        return result;
    }
    const u32 sign = signs << (3 - t) & SIGNS;
    if (BITS == 5) {
        result.low = low | sign;
        result.high = (low ^ SIGNS) | sign;
        return result;
    }
    const u32 fields = low >> (2 * (t >> 1));
    result.low = BITS == 3 ? (fields & 0x33333333u) | sign : (fields & 0x11111111u) | (fields & 0x22222222u) << 2;
    return result;
}

// The same with all signs turned.
SHARED_CODE Selectors turned(u32 low, u32 signs, int t) {
    if (!WIDE_INDEX) {
        Selectors result = selectors(low, signs, t);
        result.low ^= SIGNS;
        return result;
    }
    return selectors(low, ~signs, t);
}

// The upper four nibbles.
SHARED_CODE Selectors upper(Selectors s) {
    s.low >>= 16;
    if (WIDE_INDEX) s.high >>= 16;
    return s;
}

// A byte for every index; `words[2]` and `words[3]` for indices of 4 bits alone.
struct Table {
    u32 words[4];
};

SHARED_CODE u32 look_up(const Table& table, Selectors s) {
    const u32 low = permute(table.words[0], table.words[1], s.low);
    return WIDE_INDEX ? low | permute(table.words[2], table.words[3], s.high) : low;
}

// 1 where the index is 0.
SHARED_CODE u32 background(Selectors s) { return permute(1, 0, s.low); }
