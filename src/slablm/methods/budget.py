"""How many entries a row may keep: the paper's accounting.

At compression ratio CR with b-bit values, SLaB spends per weight (arXiv 2604.04493)

    p  (kept values)  +  1/b  (sign bits)  +  r (m + n) / (m n)  (factors)  =  1 − CR

of a dense b-bit weight. Positions are *not* counted. A pure pruner has no signs and no factors, so p = 1 − CR. The
number of entries kept in each row of n is k = ⌊p n⌋.

With values in b bits on a grid (`grid`) positions are counted: a budget is then in true bits, those of a file.

    k codes of b bits, and their signs      in every row; together with the plane, see below
    ⌈n / group_size⌉ scales, one offset     in every row, 16 bits each
    r (m + n)                               numbers in the factors, 16 bits each

A sign can be in one of two places, whichever takes less. With *signs in the codes*, a row has n ternary states, five
to a byte, and k codes of b + 1 bits; with *signs in a plane*, two bitmaps and k codes of b bits. The second takes less
when more than two in five entries are kept.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from slablm.config import CompressionConfig
from slablm.errors import SlabError

PAPER_VALUE_BITS = 16

# floor(p n) must not lose an entry to the rounding of p: (1 − 0.9) · 10 is 0.9999999999999998 in binary.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class RowBudget:
    """What is stored of a weight.

    Attributes:
        kept: entries k kept per row.
        rank: rank r of the factors.
        signs: whether signs are stored.
        bits: bits of a magnitude on a grid; None for values in 16 bits.
    """

    kept: int
    rank: int
    signs: bool
    bits: int | None = None


def overhead(shape: tuple[int, int], rank: int, signs: bool) -> float:
    """Share of the dense bits spent on sign bits and factors.

    Args:
        shape: (m, n) = (out_features, in_features).
        rank: rank of the factors, 0 for none.
        signs: whether one sign bit per weight is stored.
    """
    m, n = shape
    return (1 / PAPER_VALUE_BITS if signs else 0.0) + rank * (m + n) / (m * n)


def kept_per_row(shape: tuple[int, int], config: CompressionConfig, rank: int, signs: bool, name: str = "") -> int:
    """K = ⌊p n⌋, limited to what an N:M pattern leaves.

    Args:
        shape: (m, n) of the weight.
        config: supplies `ratio` and `pattern`.
        rank: rank of the factors the method will store.
        signs: whether the method stores sign bits.
        name: how error messages call the layer.

    Raises:
        SlabError: nothing would be kept (the largest possible ratio is named), or the pattern does not divide n.
    """
    n = shape[1]
    spent = overhead(shape, rank, signs)
    k = math.floor((1 - config.ratio - spent) * n + _ROUNDING)
    where = f"layer {name}" if name else "a weight"
    if k < 1:
        largest = 1 - spent - 1 / n
        way_out = f"use at most ratio {math.floor(largest * 1e4) / 1e4:.4f}" if largest > 0 else "ignore this layer"
        raise SlabError(
            f"ratio {config.ratio} keeps no entry of {where} with shape {shape[0]}x{n} at rank {rank}: {way_out}"
        )
    if (pattern := config.n_of_m) is not None:
        if n % pattern.group:
            raise SlabError(
                f"pattern {config.pattern} does not divide the {n} inputs of {where}: "
                "choose another pattern or ignore this layer"
            )
        k = min(k, n // pattern.group * pattern.survivors)
    return k


def signs_in_codes(n: int, k: int, bits: int) -> bool:
    """Whether a row of n with k codes of b bits takes no more bytes with the signs in the codes."""
    in_codes, in_a_plane = _row_bytes(n, k, bits)
    return in_codes <= in_a_plane


def _row_bytes(n: int, k: int, bits: int) -> tuple[int, int]:
    """Bytes of a row's planes and codes: with the signs in the codes, and in a plane."""
    return -(-n // 5) + -(-k * (bits + 1) // 8), 2 * -(-n // 8) + -(-k * bits // 8)


def coded_bytes(shape: tuple[int, int], k: int, bits: int, group_size: int) -> int:
    """Bytes in a file of a rank-1 SLaB weight with values on a grid.

    Args:
        shape: (m, n).
        k: entries kept per row.
        bits: bits of a code.
        group_size: columns that share a scale.
    """
    m, n = shape
    return m * (min(_row_bytes(n, k, bits)) + 2 * (-(-n // group_size) + 1)) + 2 * (m + n)


def kept_within(shape: tuple[int, int], bits_per_weight: float, bits: int, group_size: int) -> int:
    """The largest k ≤ n whose `coded_bytes` are within a budget; 0 if there is none.

    Args:
        shape: (m, n).
        bits_per_weight: true bits per weight, file headers not counted.
        bits: bits of a code.
        group_size: columns that share a scale.
    """
    m, n = shape
    fits = bits_per_weight * m * n
    return bisect_right(range(1, n + 1), fits, key=lambda k: 8 * coded_bytes(shape, k, bits, group_size))
