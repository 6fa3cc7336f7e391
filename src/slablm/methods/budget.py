"""How many entries a row may keep: the paper's accounting.

At compression ratio CR with b-bit values, SLaB spends per weight (arXiv 2604.04493)

    p  (kept values)  +  1/b  (sign bits)  +  r (m + n) / (m n)  (factors)  =  1 − CR

of a dense b-bit weight. Positions are *not* counted. A pure pruner has no signs and no factors, so p = 1 − CR. The
number of entries kept in each row of n is k = ⌊p n⌋.

A weight with one symbol per entry (`symbols`) has no positions. It takes, all counted,

    p bits        of every entry, rows filled up to a multiple of 4 and columns to one of 64 (`slablm.packing.tiles`)
    16 bits       of each of m scales
    8 bits        of each of 2^p levels
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods.symbols import FEWEST_BITS, MOST_BITS

PAPER_VALUE_BITS = 16
SYMBOL_BITS = tuple(range(FEWEST_BITS, MOST_BITS + 1))

# floor(p n) must not lose an entry to the rounding of p: (1 − 0.9) · 10 is 0.9999999999999998 in binary.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class RowBudget:
    """What is stored of a weight.

    Attributes:
        kept: entries k kept per row.
        rank: rank r of the factors.
        signs: whether signs are stored.
    """

    kept: int
    rank: int
    signs: bool


@dataclass(frozen=True)
class SymbolBudget:
    """What is stored of a weight with one symbol per entry.

    Attributes:
        bits: p, bits of a symbol.
    """

    bits: int


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
    assert config.ratio is not None
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


def symbol_bytes(shape: tuple[int, int], bits: int) -> int:
    """Bytes in a file of a weight with one symbol per entry.

    Args:
        shape: (m, n).
        bits: p, bits of a symbol.
    """
    m, n = shape
    tiles = -(-m // 4) * 4 * (-(-n // 64) * 64) * bits // 8
    return int(tiles + 2 * m + 2**bits)


def symbol_budget(shape: tuple[int, int], bits_per_weight: float) -> SymbolBudget:
    """The most bits of a symbol that a budget allows.

    Args:
        shape: (m, n).
        bits_per_weight: true bits per weight, file headers not counted.

    Raises:
        SlabError: even the fewest are too many.
    """
    m, n = shape
    allowed = bits_per_weight * m * n * (1 + _ROUNDING)
    fitting = [p for p in SYMBOL_BITS if 8 * symbol_bytes(shape, p) <= allowed]
    if not fitting:
        least = 8 * symbol_bytes(shape, SYMBOL_BITS[0]) / (m * n)
        raise SlabError(
            f"{bits_per_weight:g} bits per weight are too few for a weight with shape {m}x{n}: use at least "
            f"{math.ceil(100 * least) / 100}, or ignore this layer"
        )
    return SymbolBudget(fitting[-1])
