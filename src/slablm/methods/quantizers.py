"""Plain quantization as a yardstick: round to nearest, and GPTQ.

Every row is cut into groups of `group_size` columns, the last one shorter if need be. A group with b-bit codes has

    scale = (max − min) / (2ᵇ − 1)  in FP16,    zero = round(−min / scale),    code = round(w / scale) + zero

clamped to [0, 2ᵇ − 1], where max and min include 0 so that zero is on the grid. The weight is scale · (code − zero).

- RTN rounds every weight on its own.
- GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds inside the column sweep: the error of a column goes into the
  columns to its right, and the scale of a group is settled when the sweep reaches it, on the weights as they are then.
  Columns are taken in their own order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods.decomposition import LayerStats
from slablm.methods.results import QuantizedWeight
from slablm.methods.sweep import BLOCK_SIZE, Block, column_sweep, required_gram

_SMALLEST_SCALE = 2.0**-24  # of FP16; also the scale of a group of zeros


def rtn(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> QuantizedWeight:
    """Round every weight to the nearest point of its group's grid.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: not used; every method has the same signature.
        config: `value_bits` and `group_size`; `ratio` and `pattern` are not used.

    Raises:
        SlabError: a group's range does not fit into an FP16 scale.
    """
    bits = config.value_bits
    groups = torch.split(weight.float(), config.group_size, dim=1)
    grids = [min_max_grid(group, bits) for group in groups]
    codes = [quantize(group, *grid, bits) for group, grid in zip(groups, grids, strict=True)]
    return _assemble(torch.cat(codes, dim=1), grids, config)


def gptq(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> QuantizedWeight:
    """Round column after column and feed the error forward.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: `gram`, [n, n].
        config: `value_bits` and `group_size`; `ratio` and `pattern` are not used.

    Raises:
        SlabError: no Gram matrix, or none that can be factored; a group's range does not fit into an FP16 scale.
    """
    gram = required_gram(stats, "gptq")
    bits, group_size = config.value_bits, config.group_size
    codes: list[Tensor] = []
    grids: list[tuple[Tensor, Tensor]] = []

    def plan(block: Block) -> Callable[[int], Tensor]:
        def replace(j: int) -> Tensor:
            if j % group_size == 0:
                grids.append(min_max_grid(block.weight[:, j : j + group_size], bits))
            codes.append(quantize(block.weight[:, j : j + 1], *grids[-1], bits))
            return dequantize(codes[-1], *grids[-1]).squeeze(1)

        return replace

    # Whole groups per block: a group must not straddle two of them.
    column_sweep(weight, gram, plan, block_size=group_size * max(1, BLOCK_SIZE // group_size))
    return _assemble(torch.cat(codes, dim=1), grids, config)


def min_max_grid(group: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The asymmetric grid that spans each row of a group.

    Args:
        group: weights, [m, g] float32.
        bits: bits of a code.

    Returns:
        scale [m, 1] float16 and zero point [m, 1] uint8.

    Raises:
        SlabError: the range does not fit into an FP16 scale.
    """
    top = 2**bits - 1
    low = group.amin(dim=1, keepdim=True).clamp_max(0)
    high = group.amax(dim=1, keepdim=True).clamp_min(0)
    scale = ((high - low) / top).clamp_min(_SMALLEST_SCALE).half()
    if not torch.isfinite(scale).all():
        raise SlabError(f"a weight range does not fit into an FP16 scale with {bits} bits: ignore this layer")
    # From the rounded scale: it is the one that is stored.
    zero = (-low / scale.float()).round().clamp(0, top)
    return scale, zero.to(torch.uint8)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of weights on a grid, [m, g] uint8.

    Args:
        weight: [m, g] float32.
        scale: [m, 1] float16.
        zero: [m, 1] uint8.
        bits: bits of a code.
    """
    return ((weight / scale.float()).round() + zero).clamp(0, 2**bits - 1).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Weights of codes, [m, g] float32; inverse of `quantize` on the grid."""
    return scale.float() * (codes.float() - zero.float())


def _assemble(codes: Tensor, grids: list[tuple[Tensor, Tensor]], config: CompressionConfig) -> QuantizedWeight:
    scales, zeros = (torch.cat(parts, dim=1) for parts in zip(*grids, strict=True))
    return QuantizedWeight(codes, scales, zeros, config.group_size, config.value_bits)
