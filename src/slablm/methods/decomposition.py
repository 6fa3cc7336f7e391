"""What a method returns and what it is given: two small containers of tensors.

A `Decomposition` stands for

    Ŵ = W_S + W_L ⊙ W_B,      W_L = Σᵢ uᵢ vᵢᵀ,      W_B ∈ {±1}^{m×n}

in *folded* form. At a position that W_S keeps, the low-rank term only shifts the kept value, so we store the sum of
both there and give that position no sign:

    Ŵ[i, j] = values        where the mask is set      (W_S + W_L ⊙ W_B, added up once)
    Ŵ[i, j] = ±W_L[i, j]    elsewhere

This is the same matrix, it costs one ternary state {kept, +, −} per weight instead of two bits, and rounding to 16
bits then hits the entry itself rather than a difference. Every row keeps the same number k of entries, so the values
are a dense [m, k] array in column order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one linear layer's calibration inputs X, [tokens, n].

    Attributes:
        input_norms: ‖X[:, j]‖₂ per input feature, [n] float32. This is d in the paper's score `|W| · d`.
        tokens: number of rows of X.
        sample: a few rows of X, [s, n] float32, for measuring the output error; may be empty.
        gram: XᵀX, [n, n] float32, for methods that need it (`slablm.methods.Method`); None for all others.
        held_out: XᵀX of tokens that are not in `gram`, for methods that need it.
        unseen: a few inputs, [s, n] float32, of text that is in none of the above; None if there was no more text.
        routed: of a layer of an expert, how many of the tokens the router sends there; None for all others.
        kept: what `once` has made; None where it keeps nothing.
    """

    input_norms: Tensor
    tokens: int
    sample: Tensor
    gram: Tensor | None = None
    held_out: Tensor | None = None
    unseen: Tensor | None = None
    routed: int | None = None
    kept: dict[Hashable, Any] | None = None

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What can be made of the Gram matrix alone, for all layers that read the same inputs.

        Args:
            key: what it is.
            make: makes it; called once per key where layers share the statistics, else each time: what is as large as
                a Gram matrix is not kept for nobody.
        """
        if self.kept is None:
            return make()
        if key not in self.kept:
            self.kept[key] = make()
        made: Made = self.kept[key]
        return made

    def output_error(self, weight: Tensor, approximation: Tensor) -> float:
        """`relative_error` on the sampled rows.

        Args:
            weight: W, [m, n].
            approximation: Ŵ, [m, n].
        """
        return relative_error(weight, approximation, self.sample)

    def unseen_error(self, weight: Tensor, approximation: Tensor) -> float | None:
        """`relative_error` on text that calibrated nothing, where a fit to the calibration's noise shows.

        Args:
            weight: W, [m, n].
            approximation: Ŵ, [m, n].
        """
        return None if self.unseen is None else relative_error(weight, approximation, self.unseen)


def relative_error(weight: Tensor, approximation: Tensor, inputs: Tensor) -> float:
    """Relative output error ‖(W − Ŵ) Xᵀ‖_F / ‖W Xᵀ‖_F (0 when the output is zero).

    Args:
        weight: W, [m, n].
        approximation: Ŵ, [m, n].
        inputs: X, [s, n].
    """
    inputs = inputs.to(weight.device)
    reference = torch.linalg.matrix_norm(inputs @ weight.float().T)
    difference = torch.linalg.matrix_norm(inputs @ (weight.float() - approximation.float()).T)
    return torch.where(reference > 0, difference / reference, 0.0).item()


@dataclass(frozen=True)
class Decomposition:
    """A weight as sparse values plus a sign-modulated low-rank matrix (folded form, see the module's text).

    Attributes:
        mask: kept positions, [m, n] bool, exactly k per row.
        values: Ŵ at the kept positions of each row, in column order, [m, k].
        left: u, [m, r]; r is 0 for a pure pruner.
        right: vᵀ, [r, n].
        signs: the ±1 matrix W_B as [m, n] bool, True for −1; None when W_L is used without signs. Its entries at
            kept positions carry no meaning.
    """

    mask: Tensor
    values: Tensor
    left: Tensor
    right: Tensor
    signs: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out_features, in_features)."""
        return self.mask.shape[0], self.mask.shape[1]

    @property
    def rank(self) -> int:
        """Rank r of the stored factors."""
        return self.left.shape[1]

    @property
    def kept(self) -> int:
        """Entries k kept in each row."""
        return self.values.shape[1]

    def dense(self) -> Tensor:
        """Ŵ, [m, n] float32."""
        background = low_rank(self.left, self.right)
        if self.signs is not None:
            background = torch.where(self.signs, -background, background)
        return background.masked_scatter_(self.mask, self.values.float())

    def bits(self, value_bits: int = 16) -> int:
        """Exact bits in the paper's accounting: values, sign bits and factors; positions not counted."""
        m, n = self.shape
        signs = m * n if self.signs is not None else 0
        return value_bits * m * self.kept + value_bits * self.rank * (m + n) + signs


def low_rank(left: Tensor, right: Tensor) -> Tensor:
    """Σᵢ uᵢ vᵢᵀ in float32, [m, n], summed in index order.

    A matrix product may add in any order; one outer product at a time gives the same bits on every machine, and that
    is what makes packing bit-exact.

    Args:
        left: u, [m, r].
        right: vᵀ, [r, n].
    """
    left, right = left.float(), right.float()
    if left.shape[1] == 0:
        return left.new_zeros(left.shape[0], right.shape[1])
    total = torch.outer(left[:, 0], right[0])
    for i in range(1, left.shape[1]):
        total += torch.outer(left[:, i], right[i])
    return total
