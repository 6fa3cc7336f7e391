"""One symbol per weight: the form in which `slab+` writes a weight.

    Ŵ_ij = τ_ij · s_i · a_{c_ij},       a_c = (q_c + ½) / 128

A symbol c is a number of p bits, an index into 2^p signed levels that belong to the whole weight; s_i is a scale of the
row. The sign τ is not stored. Rows lie in tiles of four, each with a row above it; above the first of a tile is the
fourth:

    τ_ij = −1 if the symbol of column j in the row above is odd, else +1

So an entry has the levels a or −a to choose from, twice as many values as its bits can tell apart, and to choose one
is to choose which set the entry below has: a trellis code with two states that ends where it began (`trellis`). For
rotated inputs (`rotation`) it is W R that is written so.

Scales are FP16 and not negative. The q are integers of 8 bits; half a step is added so that −a is on the same grid,
that of ~q = −q − 1. A scale has 11 significant bits and a level 8, so their product is exact in float32: Ŵ (before it
is rotated back) is the same to the last bit on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slablm.methods.rotation import Rotation

FEWEST_BITS, MOST_BITS = 2, 6
# Rows whose symbols depend on each other.
TILE_ROWS = 4
_SCALE_BITS, _LEVEL_BITS = 16, 8
_ROTATION_BITS = 64 + 8  # the seed, and the logarithm of the block
_HALF_STEPS = 256


def level_values(levels: Tensor) -> Tensor:
    """The levels a of integers q, any shape, float32."""
    return (levels.float() + 0.5) / (_HALF_STEPS // 2)


def on_grid(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Integers q whose levels are proportional to given ones, as nearly as that is possible, and the factor.

    The largest level becomes an odd number of half steps, the one from which the others are moved least.

    Args:
        levels: [2^p] float32.

    Returns:
        q, [2^p] int8, and the number by which their levels must be multiplied, [] float32.
    """
    largest = levels.abs().amax()
    relative = levels / largest.clamp_min(torch.finfo(levels.dtype).tiny)
    most = torch.arange(_HALF_STEPS // 2 + 1, _HALF_STEPS, 2, device=levels.device)[:, None]
    odd = 2 * (relative * most / 2).floor().clamp_max(most // 2) + 1
    best = (odd / most - relative).square().sum(dim=1).argmin()
    return ((odd[best] - 1) / 2).to(torch.int8), largest * _HALF_STEPS / most[best, 0]


def signs(codes: Tensor) -> Tensor:
    """τ of every entry, ±1, [m, n] float32.

    Args:
        codes: c, [m, n] uint8.
    """
    return 1 - 2 * (_above(codes) & 1).float()


def patterns(codes: Tensor, levels: Tensor) -> Tensor:
    """τ a of every entry, [m, n] float32.

    Args:
        codes: c, [m, n] uint8.
        levels: a, [2^p] float32.
    """
    return signs(codes) * levels[codes.long()]


def _above(codes: Tensor) -> Tensor:
    """The symbol in the row above, [m, n]; that of a row that the last tile lacks is 0."""
    m, n = codes.shape
    tiles = functional.pad(codes, (0, 0, 0, -m % TILE_ROWS)).view(-1, TILE_ROWS, n)
    return tiles.roll(1, dims=1).reshape(-1, n)[:m]


@dataclass(frozen=True)
class SymbolWeight:
    """A weight as symbols.

    Attributes:
        codes: c, [m, n] uint8, below 2^p.
        scales: s, [m] float16.
        levels: q, [2^p] int8.
        rotation: of the inputs, if there is one.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        m, n = self.shape
        if self.scales.shape != (m,):
            raise ValueError("there must be one scale per row")
        if len(self.levels) not in (2**bits for bits in range(FEWEST_BITS, MOST_BITS + 1)):
            raise ValueError(f"{len(self.levels)} levels do not fill symbols of {FEWEST_BITS} to {MOST_BITS} bits")
        if self.codes.dtype != torch.uint8 or (self.codes >= len(self.levels)).any():
            raise ValueError("codes must be uint8 and lower than the number of levels")
        if self.scales.dtype != torch.float16 or not torch.isfinite(self.scales).all() or (self.scales < 0).any():
            raise ValueError("scales must be finite, non-negative float16")
        if self.levels.dtype != torch.int8:
            raise ValueError("levels must be int8")
        if self.rotation is not None and self.rotation.size != n:
            raise ValueError(f"a rotation of {self.rotation.size} inputs does not fit a weight with {n}")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def symbol_bits(self) -> int:
        """P, bits of a symbol."""
        return len(self.levels).bit_length() - 1

    def rotated_dense(self) -> Tensor:
        """Ŵ R, the matrix for rotated inputs (Ŵ where there is no rotation), [m, n] float32, exact."""
        return self.scales.float()[:, None] * patterns(self.codes, level_values(self.levels))

    def dense(self) -> Tensor:
        """Ŵ, [m, n] float32."""
        matrix = self.rotated_dense()
        return matrix if self.rotation is None else self.rotation.restore(matrix)

    def true_bits(self) -> int:
        """Bits of symbols, scales and levels, and of the rotation, without padding."""
        rotation = 0 if self.rotation is None else _ROTATION_BITS
        numbers = _SCALE_BITS * self.scales.numel() + _LEVEL_BITS * self.levels.numel()
        return self.symbol_bits * self.codes.numel() + numbers + rotation

    def bits(self) -> int:
        """The same as `true_bits`: there are no positions, so the paper's accounting leaves nothing out."""
        return self.true_bits()
