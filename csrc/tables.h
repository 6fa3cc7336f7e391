// Byte shuffles that spread the first values of a register over the set bits of an 8-bit mask.
#pragma once

#include <stdint.h>

namespace {

constexpr uint8_t kNothing = 0x80;  // a shuffle writes 0 for it

struct SpreadTables {
    alignas(16) uint8_t bytes[256][8];    // values of one byte
    alignas(16) uint8_t halves[256][16];  // values of two bytes
};

constexpr SpreadTables make_spread_tables() {
    SpreadTables tables = {};
    for (int mask = 0; mask < 256; ++mask) {
        uint8_t next = 0;
        for (int lane = 0; lane < 8; ++lane) {
            const bool set = mask >> lane & 1;
            tables.bytes[mask][lane] = set ? next : kNothing;
            tables.halves[mask][2 * lane] = set ? static_cast<uint8_t>(2 * next) : kNothing;
            tables.halves[mask][2 * lane + 1] = set ? static_cast<uint8_t>(2 * next + 1) : kNothing;
            if (set) ++next;
        }
    }
    return tables;
}

alignas(64) constexpr SpreadTables kSpread = make_spread_tables();

}  // namespace
