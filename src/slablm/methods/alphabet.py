"""One symbol per weight: the form in which `slab+` writes a weight.

    Ŵ_ij = σ_ij · ( u_i v_j       where c_ij = 0
                    s_ig a_c      where c = c_ij = 1 … L ),      σ_ij = ±1,      g = ⌊j / group_size⌋

A symbol is a sign and an index c, p bits together, L = 2^(p−1) − 1. Index 0 is the low-rank background, all others are
magnitudes: levels a that belong to the whole weight times a scale s that belongs to a row and a group of columns. So it
is SLaB, W_S where c is not 0 and W_L ⊙ W_B elsewhere, and a number of kept entries that is free in every row. For
rotated inputs (`rotation`) it is W R that is written so.

u, v, s and a are FP16 and not negative. Levels lie on a grid, a_c = q_c a_L / T with integers q_c and T ≤ `MOST_STEPS`,
so that kernels can look them up as bytes: of all T from half of that on the one that moves them least is taken. (A
reader needs no grid: FORMAT.md asks for levels that ascend, no more.) A product of two FP16 numbers has at most 22
significant bits, so it is exact in float32: Ŵ (before it is rotated back) is the same to the last bit on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slablm.errors import SlabError
from slablm.methods.rotation import Rotation

FEWEST_BITS, MOST_BITS = 2, 5
# Seven bits: the eighth is the sign's, or free for what an instruction makes of it.
MOST_STEPS = 127
_VALUE_BITS = 16
_ROTATION_BITS = 64 + 8  # the seed, and the logarithm of the block


def level_count(bits: int) -> int:
    """L, the number of levels beside the background, for symbols of `bits` bits."""
    return int(2 ** (bits - 1) - 1)


@dataclass(frozen=True)
class Alphabet:
    """The magnitudes that the entries of a weight may have.

    Attributes:
        left: u, [m].
        right: v, [n].
        scales: s, [m, ⌈n / group_size⌉].
        levels: a, ascending, [L].
        group_size: columns that share a scale; the last group may be narrower.

    All tensors are non-negative, and float32 while they are fitted; see `stored`.
    """

    left: Tensor
    right: Tensor
    scales: Tensor
    levels: Tensor
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the weight."""
        return len(self.left), len(self.right)

    def groups(self) -> Tensor:
        """The group of every column, [n] int64."""
        return torch.arange(len(self.right), device=self.right.device) // self.group_size

    def background(self) -> Tensor:
        """U vᵀ, [m, n] float32."""
        return torch.outer(self.left.float(), self.right.float())

    def wide_scales(self) -> Tensor:
        """The scale of every entry, [m, n] float32."""
        return self.scales.float().repeat_interleave(self.group_size, dim=1)[:, : len(self.right)]

    def magnitudes(self, codes: Tensor) -> Tensor:
        """|Ŵ| for indices c, [m, n] integers: [m, n] float32."""
        kept = self.wide_scales() * self.levels.float()[(codes.long() - 1).clamp_min_(0)]
        return torch.where(codes > 0, kept, self.background())

    def nearest(self, sizes: Tensor) -> Tensor:
        """The index of the nearest magnitude of every entry, [m, n] uint8; of equally near ones the background.

        Args:
            sizes: non-negative, [m, n] float32.
        """
        keep, index, _ = nearest_level(sizes, self.background(), self.wide_scales(), self.levels.float())
        return torch.where(keep, index + 1, 0).to(torch.uint8)

    def stored(self) -> Alphabet:
        """Every number rounded to FP16, still float32: what a reader will find.

        Raises:
            SlabError: a number does not fit into FP16.
        """
        left, right = _balanced(self.left, self.right)
        levels, scales = _balanced(on_grid(self.levels), self.scales)
        # Levels that are equal but for float32's last bit must not be rounded apart in the wrong order.
        levels = levels.cummax(dim=0).values
        parts = [part.half() for part in (left, right, scales, levels)]
        if not all(torch.isfinite(part).all() for part in parts):
            raise SlabError("a weight does not fit into FP16 scales and factors: ignore this layer")
        left, right, scales, levels = (part.float() for part in parts)
        return Alphabet(left, right, scales, levels, self.group_size)


def nearest_level(sizes: Tensor, background: Tensor, scales: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether a scaled level is nearer than the background, which one (counted from 0), and its magnitude.

    Args:
        sizes: non-negative float32, any shape.
        background: u_i v_j of every entry, same shape.
        scales: s of every entry, same shape; where it is 0 all levels are.
        levels: a, ascending, [L] float32.
    """
    between = (levels[1:] + levels[:-1]) / 2
    index = torch.bucketize(sizes / scales.clamp_min(torch.finfo(torch.float32).tiny), between)
    kept = levels[index].mul_(scales)
    return (kept - sizes).abs_() < (background - sizes).abs_(), index, kept


def on_grid(levels: Tensor) -> Tensor:
    """Levels moved to the grid that is nearest to them, the largest excepted.

    Args:
        levels: a, ascending, [L] float32.
    """
    steps = torch.arange(MOST_STEPS // 2 + 1, MOST_STEPS + 1, device=levels.device)[:, None]
    places = levels / levels[-1] * steps
    moved = places.round() / steps
    best = (moved - levels / levels[-1]).square().sum(dim=1).argmin()
    return torch.where(levels[-1] > 0, moved[best] * levels[-1], levels)


def grid_steps(levels: Tensor) -> int | None:
    """T, if stored levels lie on a grid as of `on_grid`; else None.

    Args:
        levels: a, ascending, [L] float16.
    """
    wide = levels.double().cpu()
    steps = torch.arange(1, MOST_STEPS + 1, dtype=torch.float64)[:, None]
    places = wide / wide[-1] * steps
    # A level was rounded to FP16, and so was the largest.
    room = places * torch.finfo(torch.float16).eps
    fits = ((places - places.round()).abs() <= room).all(dim=1)
    return int(steps[fits][0]) if wide[-1] > 0 and fits.any() else None


def _balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of a product with equally large entries, up to a power of two: far from both ends of FP16."""
    ratio = second.amax() / first.amax()
    share = torch.where((ratio > 0) & (ratio < torch.inf), torch.exp2((ratio.log2() / 2).round()), 1.0)
    return first * share, second / share


@dataclass(frozen=True)
class SymbolWeight:
    """A weight as symbols.

    Attributes:
        codes: c, [m, n] uint8, 0 to L.
        signs: σ, [m, n] bool, True for −1.
        alphabet: u, v, s and a, all float16.
        rotation: of the inputs, if there is one.
    """

    codes: Tensor
    signs: Tensor
    alphabet: Alphabet
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        (m, n), alphabet = self.shape, self.alphabet
        if alphabet.shape != (m, n) or self.signs.shape != (m, n):
            raise ValueError("codes, signs and factors have different shapes")
        if alphabet.scales.shape != (m, -(-n // alphabet.group_size)):
            raise ValueError("there must be one scale per row and group of columns")
        if len(alphabet.levels) not in map(level_count, range(FEWEST_BITS, MOST_BITS + 1)):
            raise ValueError(f"{len(alphabet.levels)} levels do not fill symbols of {FEWEST_BITS} to {MOST_BITS} bits")
        if self.codes.dtype != torch.uint8 or (self.codes > len(alphabet.levels)).any():
            raise ValueError("codes must be uint8 and no larger than the number of levels")
        for part in (alphabet.left, alphabet.right, alphabet.scales, alphabet.levels):
            if part.dtype != torch.float16 or not torch.isfinite(part).all() or (part < 0).any():
                raise ValueError("factors, scales and levels must be finite, non-negative float16")
        if (alphabet.levels.diff() < 0).any():
            raise ValueError("levels must ascend")
        if self.rotation is not None and self.rotation.size != n:
            raise ValueError(f"a rotation of {self.rotation.size} inputs does not fit a weight with {n}")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def symbol_bits(self) -> int:
        """P, bits of a symbol."""
        return len(self.alphabet.levels).bit_length() + 1

    def symbols(self) -> Tensor:
        """What is stored of every entry: the index, and in the bit above it the sign, [m, n] uint8."""
        return self.codes | self.signs.to(torch.uint8) << (self.symbol_bits - 1)

    def rotated_dense(self) -> Tensor:
        """Ŵ R, the matrix for rotated inputs (Ŵ where there is no rotation), [m, n] float32, exact."""
        sizes = self.alphabet.magnitudes(self.codes)
        return torch.where(self.signs, -sizes, sizes)

    def dense(self) -> Tensor:
        """Ŵ, [m, n] float32."""
        matrix = self.rotated_dense()
        return matrix if self.rotation is None else self.rotation.restore(matrix)

    def true_bits(self) -> int:
        """Bits of symbols, scales, levels and factors, and of the rotation, without padding."""
        alphabet = self.alphabet
        values = sum(part.numel() for part in (alphabet.left, alphabet.right, alphabet.scales, alphabet.levels))
        rotation = 0 if self.rotation is None else _ROTATION_BITS
        return self.symbol_bits * self.codes.numel() + _VALUE_BITS * values + rotation

    def bits(self) -> int:
        """The same as `true_bits`: there are no positions, so the paper's accounting leaves nothing out."""
        return self.true_bits()


def written(codes: Tensor, minus: Tensor, alphabet: Alphabet, rotation: Rotation | None = None) -> SymbolWeight:
    """A weight in a stored alphabet.

    Args:
        codes: c, [m, n] uint8.
        minus: where σ is −1, [m, n] bool.
        alphabet: as of `Alphabet.stored`.
        rotation: of the inputs.
    """
    parts = (part.half() for part in (alphabet.left, alphabet.right, alphabet.scales, alphabet.levels))
    left, right, scales, levels = parts
    halves = replace(alphabet, left=left, right=right, scales=scales, levels=levels)
    return SymbolWeight(codes, minus, halves, rotation)
