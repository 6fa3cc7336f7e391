"""Rotated inputs: random signs and a Hadamard transform spread what is large over many columns.

A rotation R, RᵀR = I, between a weight and its inputs changes nothing, W x = (W R)(Rᵀ x), but W R is easier to
approximate than W: every entry of it is a mixture of a block of entries, so there are no outliers, and no few columns
that carry most of the error. Here

    R = D · diag(H_b, …, H_b),      D = diag(±1),      H_b the Hadamard matrix of order b over √b

with b a power of two that divides n. H_b is symmetric and its own inverse, so with h(x) the transform of each block

    Rᵀ x = h(D x),      R y = D h(y),      a row w of W R is h(D w),      G' = Rᵀ G R  for  G = XᵀX

and all of them are the fast Walsh–Hadamard transform, n log₂ b additions: for s = 1, 2, 4, … b/2, the entries p and q
of a block whose indices differ in bit s only become p + q and p − q; in the end all are divided by √b. The signs are
not stored, only a seed. Sign j is minus where the top bit of output j of splitmix64 (Steele, Lea and Flood 2014) is
set, in integers modulo 2⁶⁴:

    z = seed + (j + 1) · 9E3779B97F4A7C15₁₆
    z = (z ⊕ z ≫ 30) · BF58476D1CE4E5B9₁₆
    z = (z ⊕ z ≫ 27) · 94D049BB133111EB₁₆
    output = z ⊕ z ≫ 31
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Random signs and the Hadamard transform of blocks of columns.

    Attributes:
        size: n, columns.
        block: b, a power of two that divides n. 1 leaves the signs alone.
        seed: of the signs, 0 to 2⁶⁴ − 1.
    """

    size: int
    block: int
    seed: int

    def __post_init__(self) -> None:
        if self.block < 1 or self.block & (self.block - 1) or self.size % self.block:
            raise ValueError(f"a block of {self.block} is no power of two that divides {self.size} columns")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed} does not fit into 64 bits")

    @cached_property
    def signs(self) -> Tensor:
        """The diagonal of D, ±1, [n] float32 on the CPU."""
        minus = splitmix64(self.seed, self.size) >> 63
        return torch.from_numpy(1 - 2 * minus.astype(np.float32))

    def rotate(self, rows: Tensor) -> Tensor:
        """Rᵀ of every row: of inputs, and of a weight W, which becomes W R.

        Args:
            rows: [..., n] floating point; the result has their dtype and device.
        """
        return _hadamard_((rows * self.signs.to(rows)).contiguous(), self.block)

    def restore(self, rows: Tensor) -> Tensor:
        """Inverse of `rotate`: R of every row."""
        return hadamard(rows, self.block) * self.signs.to(rows)

    def rotate_gram(self, gram: Tensor) -> Tensor:
        """Rᵀ G R: the Gram matrix of rotated inputs, [n, n], exactly symmetric if G is."""
        rotated = self.rotate(self.rotate(gram).T)
        # The two orders of summation differ in the last bits.
        return (rotated + rotated.T).div_(2)


def splitmix64(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """The first outputs of the generator in the module's text, [count]."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def largest_block(size: int, cap: int | None = None) -> int:
    """The largest power of two that divides `size`, and is no more than `cap`."""
    block = size & -size
    return block if cap is None else min(block, 2 ** (cap.bit_length() - 1))


def hadamard(rows: Tensor, block: int) -> Tensor:
    """Orthonormal Walsh–Hadamard transform of every `block` entries of the last axis, in natural order.

    Args:
        rows: [..., n].
        block: a power of two that divides n.
    """
    return _hadamard_(rows.clone(memory_format=torch.contiguous_format), block)


def _hadamard_(rows: Tensor, block: int) -> Tensor:
    """The same in place, of contiguous rows: a Gram matrix is large, and nothing may be there twice."""
    step = 1
    while step < block:
        pairs = rows.view(-1, 2, step)
        first, second = pairs[:, 0], pairs[:, 1]
        difference = first - second
        first += second
        second.copy_(difference)
        step *= 2
    return rows.mul_(1 / math.sqrt(block))
