// The primitives for symbols in plain C++ (see symbols.h): slow, but every compiler has them.
#pragma once

#include "tiles.h"

namespace {

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
    template <int N>
    static void totals(const Floats (&a)[N], float (&out)[N]) {
        for (int i = 0; i < N; ++i) out[i] = Base::total(a[i]);
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

}  // namespace
