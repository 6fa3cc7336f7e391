"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774): prune in a column sweep with error feedback.

Setting w_j to zero costs w_j² / [H_F⁻¹]_jj = (w_j / U_jj)² (see `sweep`).

- Unstructured: when the sweep reaches a block of 128 columns, the entries of the whole block, all rows together, with
  the largest cost are kept. Rows keep different numbers of entries. We do not force them to agree, because that would
  be a weaker method than the one published; the result is therefore a `PrunedWeight`, for comparison only.
- N:M: when the sweep reaches a group of M columns, the N costliest entries of every row are kept.
- N:M with a ratio that asks for fewer than N of M: the paper knows no such case. As for the other methods, at most N
  of M survive first and the block's budget picks among those, here at the start of the block.

The total is m · k entries, exactly that of Wanda at the same ratio; each block gets its share up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slablm.config import CompressionConfig, Pattern
from slablm.methods.budget import kept_per_row
from slablm.methods.decomposition import LayerStats
from slablm.methods.results import PrunedWeight
from slablm.methods.select import group_mask, top_k_mask
from slablm.methods.sweep import BLOCK_SIZE, Block, Plan, Replace, by_column, column_sweep, factored, required_gram


def sparsegpt(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> PrunedWeight:
    """Prune one weight.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: `gram`, [n, n].
        config: `ratio` and `pattern`.

    Raises:
        SlabError: no Gram matrix, or none that can be factored; the ratio leaves no entry, or the pattern does not
            divide n.
    """
    gram = required_gram(stats, "sparsegpt")
    m, n = weight.shape
    k, pattern = kept_per_row((m, n), config, rank=0, signs=False), config.n_of_m
    mask = torch.zeros(m, n, dtype=torch.bool, device=weight.device)
    block_size = BLOCK_SIZE
    if pattern is not None:  # a group must not straddle two blocks
        block_size = pattern.group * max(1, BLOCK_SIZE // pattern.group)
    by_group = pattern is not None and k == n // pattern.group * pattern.survivors
    plan = _group_plan(mask, pattern) if pattern is not None and by_group else _block_plan(mask, k, pattern)
    pruned = column_sweep(weight, factored(gram), plan, block_size)
    return PrunedWeight(mask=mask, values=pruned[mask])


def _block_plan(mask: Tensor, k: int, pattern: Pattern | None) -> Plan:
    """Settle the mask of a block when the sweep reaches it; fills `mask`, [m, n], on the way."""
    m, n = mask.shape

    @by_column
    def plan(block: Block) -> Replace:
        stop = block.start + block.weight.shape[1]
        # Differences of running totals, so that the blocks add up to m · k.
        kept = m * k * stop // n - m * k * block.start // n
        chosen = mask[:, block.start : stop]
        if kept:
            costs = (block.weight / block.diagonal).abs()  # its root: same order, no underflow
            chosen.copy_(top_k_mask(costs.reshape(1, -1), kept, pattern).view_as(chosen))
        return lambda j: block.weight[:, j] * chosen[:, j]

    return plan


def _group_plan(mask: Tensor, pattern: Pattern) -> Plan:
    """Settle the mask of a group of M columns when the sweep reaches it; fills `mask`, [m, n], on the way."""

    @by_column
    def plan(block: Block) -> Replace:
        chosen = mask[:, block.start : block.start + block.weight.shape[1]]

        def replace(j: int) -> Tensor:
            if j % pattern.group == 0:
                group = slice(j, j + pattern.group)
                costs = (block.weight[:, group] / block.diagonal[group]).abs()
                chosen[:, group] = group_mask(costs.contiguous(), pattern)
            return block.weight[:, j] * chosen[:, j]

        return replace

    return plan
