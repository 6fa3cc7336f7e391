"""Uniform grids: which points the weights of a plain quantizer may take, and how far a grid reaches.

Every row is cut into groups of `group_size` columns, the last one shorter if need be. A group with b-bit codes has

    scale = c · (max − min) / (2ᵇ − 1)  in FP16,    zero = round(−c · min / scale),    code = round(w / scale) + zero

clamped to [0, 2ᵇ − 1], where max and min include 0 so that zero is on the grid. The weight is scale · (code − zero).

The clip c is 1 for the plain grid, which spans its group. A smaller one moves the few largest weights of the group to
the end of the grid and makes the steps of all others finer. Every c in `CLIPS` is tried on every group of every row,
and the one with the smallest cost is taken; what an error costs is the caller's affair. That is the search of the
GPTQ code (``mse``) and of AWQ (arXiv 2306.00978, section 3.2, and its code, which also goes down to a half).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from slablm.errors import SlabError

CLIPS = tuple(1 - step / 20 for step in range(11))
_SMALLEST_SCALE = 2.0**-24  # of FP16; also the scale of a group of zeros

Grids = tuple[Tensor, Tensor]
Cost = Callable[[Tensor], Tensor]


def in_groups(matrix: Tensor, group_size: int) -> Tensor:
    """[m, n] → [m, ⌈n / group_size⌉, group_size], the last group filled up with zeros.

    They change no grid: zero is on each.
    """
    return functional.pad(matrix, (0, -matrix.shape[1] % group_size)).view(len(matrix), -1, group_size)


def spanning_grids(weight: Tensor, bits: int, group_size: int) -> Grids:
    """The plain grid of every group: scales [m, g] float16 and zero points [m, g] uint8, g = ⌈n / group_size⌉.

    Args:
        weight: W, [m, n] float32.
        bits: bits of a code.
        group_size: columns that share a scale.

    Raises:
        SlabError: a range does not fit into an FP16 scale.
    """
    scales, zeros = min_max_grid(in_groups(weight, group_size), bits)
    return scales.squeeze(-1), zeros.squeeze(-1)


def clipped_grids(weight: Tensor, bits: int, group_size: int, cost: Cost) -> Grids:
    """Of every group the grid with the clip that costs least, as `spanning_grids`; of equal ones the widest.

    Args:
        weight: W, [m, n] float32.
        bits: bits of a code.
        group_size: columns that share a scale.
        cost: of the errors Ŵ − W of all groups, [m, g, group_size] → [m, g].

    Raises:
        SlabError: a range does not fit into an FP16 scale.
    """
    groups = in_groups(weight, group_size)

    def tried(clip: float) -> tuple[Tensor, Tensor, Tensor]:
        scales, zeros = min_max_grid(groups, bits, clip)
        lost = dequantize(quantize(groups, scales, zeros, bits), scales, zeros).sub_(groups)
        return cost(lost)[..., None], scales, zeros

    least, scales, zeros = tried(CLIPS[0])
    for clip in CLIPS[1:]:
        lost, other_scales, other_zeros = tried(clip)
        better = lost < least
        least = torch.where(better, lost, least)
        scales, zeros = torch.where(better, other_scales, scales), torch.where(better, other_zeros, zeros)
    return scales.squeeze(-1), zeros.squeeze(-1)


def min_max_grid(group: Tensor, bits: int, clip: float = 1.0) -> Grids:
    """The asymmetric grid that spans each row of a group, or a share of it.

    Args:
        group: weights, [..., g] float32.
        bits: bits of a code.
        clip: c, above 0 and at most 1.

    Returns:
        scale [..., 1] float16 and zero point [..., 1] uint8.

    Raises:
        SlabError: the range does not fit into an FP16 scale.
    """
    top = 2**bits - 1
    low = clip * group.amin(dim=-1, keepdim=True).clamp_max(0)
    high = clip * group.amax(dim=-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / top).clamp_min(_SMALLEST_SCALE).half()
    if not torch.isfinite(scale).all():
        raise SlabError(f"a weight range does not fit into an FP16 scale with {bits} bits: ignore this layer")
    # From the rounded scale: it is the one that is stored.
    zero = (-low / scale.float()).round().clamp(0, top)
    return scale, zero.to(torch.uint8)


def round_to_grids(weight: Tensor, grids: Grids, bits: int, group_size: int) -> Tensor:
    """Nearest codes of a whole weight, [m, n] uint8.

    Args:
        weight: W, [m, n] float32.
        grids: as of `spanning_grids`.
        bits: bits of a code.
        group_size: columns that share a scale.
    """
    scales, zeros = grids
    codes = quantize(in_groups(weight, group_size), scales[..., None], zeros[..., None], bits)
    return codes.flatten(1)[:, : weight.shape[1]].contiguous()


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of weights on a grid, [..., g] uint8.

    Args:
        weight: [..., g] float32.
        scale: [..., 1] float16.
        zero: [..., 1] uint8.
        bits: bits of a code.
    """
    return ((weight / scale.float()).round() + zero).clamp(0, 2**bits - 1).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Weights of codes, [..., g] float32; inverse of `quantize` on the grid."""
    return scale.float() * (codes.float() - zero.float())
