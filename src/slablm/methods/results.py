"""What methods return that are compared with SLaB but never packed.

A `Decomposition` keeps the same number of entries in every row. SparseGPT does not, and forcing it to would weaken a
baseline; a quantizer keeps no entries at all. Their results only have to say which matrix they stand for and how many
bits it takes.

Sizes come in two accountings, as everywhere. `bits` is the paper's, in which positions are free, and means the same
as `Decomposition.bits`. `true_bits` counts everything a reader needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_BITS = 16


@dataclass(frozen=True)
class PrunedWeight:
    """A sparse weight whose rows may keep different numbers of entries.

    Attributes:
        mask: kept positions, [m, n] bool.
        values: kept entries in row-major order, [number kept] float32; stored in 16 bits.
    """

    mask: Tensor
    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out_features, in_features)."""
        return self.mask.shape[0], self.mask.shape[1]

    def dense(self) -> Tensor:
        """Ŵ, [m, n] float32."""
        weight = torch.zeros(self.shape, device=self.mask.device)
        return weight.masked_scatter_(self.mask, self.values.float())

    def bits(self, value_bits: int = 16) -> int:
        """Bits in the paper's accounting: values only."""
        return value_bits * self.values.numel()

    def true_bits(self, value_bits: int = 16) -> int:
        """Values and a bitmap of positions, rows padded to bytes as in `PackedWeight`."""
        m, n = self.shape
        return self.bits(value_bits) + 8 * m * -(-n // 8)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on a uniform grid per row and group of columns: Ŵ = scale · (code − zero), or that divided by s.

    Attributes:
        codes: [m, n] uint8, below 2^value_bits.
        scales: [m, g] float16, g = ⌈n / group_size⌉.
        zeros: zero points, [m, g] uint8, below 2^value_bits.
        group_size: columns that share a scale; the last group may be shorter.
        value_bits: bits of a code and of a zero point.
        input_scales: s, [n] float16, of the inputs, if the weight was scaled before it was rounded (`awq`).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    value_bits: int
    input_scales: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dense(self) -> Tensor:
        """Ŵ, [m, n] float32."""
        n = self.codes.shape[1]
        scales, zeros = (
            per_group.float().repeat_interleave(self.group_size, dim=1)[:, :n]
            for per_group in (self.scales, self.zeros)
        )
        weight = scales * (self.codes.float() - zeros)
        return weight if self.input_scales is None else weight / self.input_scales.float()

    def bits(self) -> int:
        """Codes, scales and zero points. There are no positions, so the paper's accounting is the true one."""
        scales = self.scales.numel() + (0 if self.input_scales is None else self.input_scales.numel())
        return self.value_bits * (self.codes.numel() + self.zeros.numel()) + SCALE_BITS * scales

    def true_bits(self) -> int:
        """The same as `bits`."""
        return self.bits()
