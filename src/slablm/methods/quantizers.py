"""Plain quantization as a yardstick: round to nearest, and GPTQ, each at its best and in its plain form.

The grids are those of `uniform`: per row and group of `group_size` columns a scale and a zero point.

- RTN rounds every weight on its own. It looks at no text, so its clips are searched on Σ (ŵ − w)². Where few inputs are
  far larger than the others, that can cut off just the weights that count, and the plain form is the better one.
- GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds inside the column sweep (`sweep`): the error of a column goes into
  those that come after it. With G = XᵀX and d_j² = G_jj, and three things that the paper leaves out or names in
  passing, and that its code and its successors have:

  1. *Activation order*: columns are taken in order of falling d (``act_order``). What large inputs lose, many small
     ones can make up for, and not the other way round.
  2. *Static groups* (``static_groups``): a group is `group_size` columns that are neighbours in the weight, whatever
     the order of the sweep, so the stored form is the same, without a table of indices. Its grid has to be known before
     the first of them comes up, so all are settled on W itself, with clips searched on Σ d_j² (ŵ_ij − w_ij)².
  3. *Held-out choice*: G is an estimate from some tokens; the less is added to its diagonal, the more its noise is
     fitted too. Each of `DAMPINGS` is tried on some rows drawn at random, and judged on tokens that were held back;
     with the best one all rows are swept. That is the result, unless on those tokens rounding without any feedback is
     better: the rules by which `slab_plus` judges itself.

The plain forms: RTN on grids that span their groups; GPTQ on such grids too, each settled when the sweep reaches its
group, on the weights as they are then, with columns in their own order and a hundredth of the mean diagonal added.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slablm.config import CompressionConfig
from slablm.methods.decomposition import LayerStats
from slablm.methods.results import QuantizedWeight
from slablm.methods.sweep import (
    BLOCK_SIZE,
    Block,
    Factor,
    Replace,
    by_column,
    column_sweep,
    factored,
    falling,
    required_gram,
)
from slablm.methods.trials import output_error, trial_rows
from slablm.methods.uniform import (
    Grids,
    clipped_grids,
    dequantize,
    in_groups,
    min_max_grid,
    quantize,
    round_to_grids,
    spanning_grids,
)

# Shares of the mean diagonal that are added to G. Without held-out tokens it is the first, which is the paper's.
DAMPINGS = (0.01, 0.1)


def rtn(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> QuantizedWeight:
    """Round every weight to the nearest point of its group's grid, which is clipped where that loses less.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: not used; every method has the same signature.
        config: `value_bits` and `group_size`; `ratio` and `pattern` are not used.

    Raises:
        SlabError: a group's range does not fit into an FP16 scale.
    """
    weight = weight.float()
    grids = clipped_grids(weight, config.value_bits, config.group_size, lambda lost: lost.square().sum(dim=-1))
    return nearest(weight, grids, config)


def rtn_plain(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> QuantizedWeight:
    """Round every weight to the nearest point of the grid that spans its group; arguments as of `rtn`."""
    weight = weight.float()
    return nearest(weight, spanning_grids(weight, config.value_bits, config.group_size), config)


def nearest(weight: Tensor, grids: Grids, config: CompressionConfig) -> QuantizedWeight:
    """Every weight, [m, n] float32, at the nearest point of its grid."""
    codes = round_to_grids(weight, grids, config.value_bits, config.group_size)
    return QuantizedWeight(codes, *grids, config.group_size, config.value_bits)


def gptq(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> QuantizedWeight:
    """Round column after column, large inputs first, and feed the error forward.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: `gram`, and `held_out`, the Gram matrix of tokens that are not in `gram`. Without the latter nothing is
            chosen: the result is that of the first of `DAMPINGS`.
        config: `value_bits`, `group_size` and `seed`; `ratio` and `pattern` are not used.

    Raises:
        SlabError: no Gram matrix, or none that can be factored; a group's range does not fit into an FP16 scale.
    """
    gram, held_out = required_gram(stats, "gptq").to(weight.device, torch.float32), stats.held_out
    # Weights of dead inputs become zero in the sweep: they must not widen a grid.
    weight = weight.float().masked_fill(gram.diagonal() == 0, 0)
    grids, order = weighted_grids(weight, gram.diagonal(), config), falling(gram)

    def factor(damping: float) -> Factor:
        return stats.once(("factor", damping), lambda: factored(gram[order][:, order], damping))

    if held_out is None:
        return swept(weight, factor(DAMPINGS[0]), grids, order, config)
    damping = best_damping(weight, factor, held_out, grids, order, config)
    fed, plain = swept(weight, factor(damping), grids, order, config), nearest(weight, grids, config)
    return fed if output_error(weight, fed.dense(), held_out) < output_error(weight, plain.dense(), held_out) else plain


def weighted_grids(weight: Tensor, importance: Tensor, config: CompressionConfig) -> Grids:
    """The grids with the clips that cost least in Σ d_j² (ŵ_ij − w_ij)².

    Args:
        weight: W, [m, n] float32.
        importance: d², [n].
        config: `value_bits` and `group_size`.
    """
    # Relative to the largest, so that equal ones are 1 whatever their size.
    share = in_groups(
        (importance / importance.max().clamp_min(torch.finfo(torch.float32).tiny))[None], config.group_size
    )
    return clipped_grids(
        weight, config.value_bits, config.group_size, lambda lost: lost.square_().mul_(share).sum(dim=-1)
    )


def best_damping(
    weight: Tensor,
    factor: Callable[[float], Factor],
    held_out: Tensor,
    grids: Grids,
    order: Tensor,
    config: CompressionConfig,
) -> float:
    """Of `DAMPINGS` the one with the smallest error of some rows on held-out tokens.

    Args:
        weight: W, [m, n] float32.
        factor: gives that of G for a damping, columns in the order of the sweep.
        held_out: G of the tokens that decide, [n, n].
        grids: of all rows.
        order: the column of the weight behind each column of the sweep, [n].
        config: `value_bits`, `group_size` and `seed`.
    """
    rows = trial_rows(len(weight), config.seed).to(weight.device)
    sample, theirs = weight[rows], (grids[0][rows], grids[1][rows])

    def error(damping: float) -> float:
        return output_error(sample, swept(sample, factor(damping), theirs, order, config).dense(), held_out)

    return min(DAMPINGS, key=error)


def swept(weight: Tensor, factor: Factor, grids: Grids, order: Tensor, config: CompressionConfig) -> QuantizedWeight:
    """Round in a column sweep, on grids that are known.

    Args:
        weight: W, [m, n] float32.
        factor: of G, columns in the order of the sweep.
        grids: of W, as of `spanning_grids`.
        order: the column of the weight behind each column of the sweep, [n].
        config: `value_bits` and `group_size`.
    """
    scales, zeros = (per_group[:, order // config.group_size] for per_group in grids)
    codes = torch.empty_like(zeros)

    @by_column
    def plan(block: Block) -> Replace:
        def replace(j: int) -> Tensor:
            at = slice(block.start + j, block.start + j + 1)
            codes[:, at] = quantize(block.weight[:, j : j + 1], scales[:, at], zeros[:, at], config.value_bits)
            return dequantize(codes[:, at], scales[:, at], zeros[:, at])[:, 0]

        return replace

    column_sweep(weight[:, order], factor, plan)
    return QuantizedWeight(codes[:, order.argsort()], *grids, config.group_size, config.value_bits)


def gptq_plain(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> QuantizedWeight:
    """Round column after column in their own order, on grids that span the group when the sweep reaches it.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: `gram`, [n, n].
        config: `value_bits` and `group_size`; `ratio` and `pattern` are not used.

    Raises:
        SlabError: no Gram matrix, or none that can be factored; a group's range does not fit into an FP16 scale.
    """
    gram = required_gram(stats, "gptq-plain")
    bits, group_size = config.value_bits, config.group_size
    codes: list[Tensor] = []
    grids: list[Grids] = []

    @by_column
    def plan(block: Block) -> Replace:
        def replace(j: int) -> Tensor:
            if j % group_size == 0:
                grids.append(min_max_grid(block.weight[:, j : j + group_size], bits))
            codes.append(quantize(block.weight[:, j : j + 1], *grids[-1], bits))
            return dequantize(codes[-1], *grids[-1]).squeeze(1)

        return replace

    # Whole groups per block: a group must not straddle two of them.
    column_sweep(weight, factored(gram), plan, block_size=group_size * max(1, BLOCK_SIZE // group_size))
    scales, zeros = (torch.cat(parts, dim=1) for parts in zip(*grids, strict=True))
    return QuantizedWeight(torch.cat(codes, dim=1), scales, zeros, group_size, bits)
