"""Magnitudes in few bits: the kept entries of a row on a grid.

A kept entry has its sign in the ±1 plane like every other, so only its magnitude is stored, in b bits:

    |ŵ_ij| = s_ig (a_i + c),      c ∈ {0 … 2ᵇ − 1},      g = ⌊j / group_size⌋

The scale s belongs to a row and a group of columns, the offset a to a row. Kept entries are the large ones: without
an offset the lowest codes would stand for magnitudes that hardly occur. a = ½ is the grid of a plain symmetric
quantizer with b + 1 bits.

The grid is fitted by search. For every offset in `OFFSETS`, each scale is that of the largest magnitude in its group,
or a share of it (`CLIPS`), whichever has the smaller Σ d_j² (|ŵ_ij| − |w_ij|)²; then each row takes its best offset.

Magnitudes are rounded to FP16 when they are stored in memory, and codes have to be found again from them. So scales are
normal FP16 numbers (a magnitude is then off by less than a thousandth of a step per step), and b is at most 7. In
bfloat16 it would be off by up to half a step at 7 bits: the highest code of a row can then be read as the one below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slablm.errors import SlabError

OFFSETS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CLIPS = (1.0, 0.9, 0.8)
SCALE_BITS = 16
_LARGEST_SCALE = 65504.0
LARGEST_BITS = 7
SMALLEST_SCALE = 2.0**-14  # the smallest normal FP16; also the scale of a group in which nothing is kept


@dataclass(frozen=True)
class ValueGrid:
    """Where the magnitudes of a weight may lie.

    Attributes:
        scales: s, [m, ⌈n / group_size⌉] float16.
        offsets: a, [m] float16.
        bits: b, bits of a code.
        group_size: columns that share a scale; the last group may be narrower.
    """

    scales: Tensor
    offsets: Tensor
    bits: int
    group_size: int

    def codes(self, magnitudes: Tensor, columns: Tensor) -> Tensor:
        """Nearest codes, same shape, uint8.

        Args:
            magnitudes: non-negative, [m, c].
            columns: the column of each entry, [c] or [m, c] int64.
        """
        steps = magnitudes / self._scales_at(columns) - self.offsets.float()[:, None]
        return steps.round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def magnitudes(self, codes: Tensor, columns: Tensor) -> Tensor:
        """Inverse of `codes` on the grid, float32."""
        return self._scales_at(columns) * (self.offsets.float()[:, None] + codes)

    def nearest(self, magnitudes: Tensor, columns: Tensor) -> Tensor:
        """Magnitudes rounded to the grid, float32."""
        return self.magnitudes(self.codes(magnitudes, columns), columns)

    def true_bits(self) -> int:
        """Bits of scales and offsets."""
        return SCALE_BITS * (self.scales.numel() + self.offsets.numel())

    def _scales_at(self, columns: Tensor) -> Tensor:
        groups = columns // self.group_size
        scales = self.scales.float()
        return scales[:, groups] if groups.ndim == 1 else scales.gather(1, groups)


def fit_grid(weight: Tensor, mask: Tensor, norms: Tensor, bits: int, group_size: int) -> ValueGrid:
    """Fit a grid to the kept entries of a weight.

    Args:
        weight: W, [m, n] float32; only magnitudes count.
        mask: kept positions, [m, n] bool.
        norms: d, [n]: how much an error in a column counts.
        bits: bits of a code, 1 to 7.
        group_size: columns that share a scale.

    Raises:
        SlabError: a magnitude does not fit into an FP16 scale.
    """
    m, n = weight.shape
    padding = (0, -n % group_size)
    kept = functional.pad(weight.abs() * mask, padding).view(m, -1, group_size)
    importance = functional.pad(mask * norms.square(), padding).view(m, -1, group_size)
    largest = kept.amax(dim=2)
    if not (largest <= (2**bits - 1) * _LARGEST_SCALE).all():
        raise SlabError("a weight does not fit into an FP16 scale: ignore this layer")
    best_error = weight.new_full((m,), torch.inf)
    best_scales, best_offsets = torch.zeros_like(largest), weight.new_zeros(m)
    for offset in OFFSETS:
        scales, error = _fit_scales(kept, importance, largest, offset, bits)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better[:, None], scales, best_scales)
        best_offsets = torch.where(better, torch.full_like(error, offset), best_offsets)
    return ValueGrid(best_scales.half(), best_offsets.half(), bits, group_size)


def _fit_scales(kept: Tensor, importance: Tensor, largest: Tensor, offset: float, bits: int) -> tuple[Tensor, Tensor]:
    """For one offset: the best scale of every group, [m, G], and the error of every row, [m]."""
    top = 2**bits - 1
    best_error, best_scales = torch.full_like(largest, torch.inf), torch.zeros_like(largest)
    for clip in CLIPS:
        scales = (clip * largest / (offset + top)).clamp_min(SMALLEST_SCALE).half().float()
        codes = (kept / scales[..., None] - offset).round_().clamp_(0, top)
        error = (codes.add_(offset).mul_(scales[..., None]).sub_(kept).square_() * importance).sum(dim=2)
        better = error < best_error
        best_error, best_scales = torch.where(better, error, best_error), torch.where(better, scales, best_scales)
    return best_scales, best_error.sum(dim=1)
