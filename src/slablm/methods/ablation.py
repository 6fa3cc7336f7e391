"""The arms of SLaB's ablation (arXiv 2604.04493, Table III): which of its parts does the work?

- ``sparse``: W ≈ W_S. Without a second term there is nothing to alternate with: one selection by |W| · d with the
  whole budget, which is Wanda.
- ``sparse+lowrank``: W ≈ W_S + W_L, W_L the best rank-16 approximation of W − W_S, no signs.
- ``sparse+scalar-binary``: W ≈ W_S + α ⊙ W_B with one factor per row. For W_B = sign(R) the least-squares optimum is
  α_i = mean |R_i,:|.

The last two alternate as `slab` does and share its loop. All spend the same budget. Rank 16 costs 16 (m + n) values
and no sign bits. The factors of ``sparse+scalar-binary`` are stored as rank 1 with v = 1 and counted as that, m + n
values where m would do: it then keeps exactly as many entries as SLaB at rank 1 and takes exactly as many bits, and
what is left between the two is v alone. This costs the arm a share 1/m of the weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slablm.config import CompressionConfig
from slablm.methods.budget import kept_per_row
from slablm.methods.decomposition import Decomposition, LayerStats, low_rank
from slablm.methods.pruning import wanda
from slablm.methods.slab import alternate, leading_factors, start_basis

# The rank of the paper's arm. `CompressionConfig.rank` belongs to SLaB and does not change it.
LOWRANK_RANK = 16


def sparse(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> Decomposition:
    """W_S alone: Wanda under its name in the ablation.

    Args:
        weight: W, [m, n].
        stats: `input_norms` d, [n].
        config: `ratio` and `pattern`.

    Raises:
        SlabError: the ratio leaves no entry, or the pattern does not divide n.
    """
    return wanda(weight, stats, config)


def sparse_lowrank(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> Decomposition:
    """W_S + W_L with rank 16 and no signs.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: `input_norms` d, [n].
        config: `ratio`, `pattern` and `iterations`.

    Raises:
        SlabError: the ratio leaves no entry, or the pattern does not divide n.
    """
    m, n = weight.shape
    k = kept_per_row((m, n), config, rank=LOWRANK_RANK, signs=False)
    # R has no gap behind its 16th singular value, unlike |R| behind its first: iterate on twice as many vectors.
    basis = start_basis(weight.float(), 2 * LOWRANK_RANK)

    def fit(residual: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal basis
        left, right, basis = leading_factors(residual, basis, LOWRANK_RANK)
        return left, right, low_rank(left, right)

    return replace(alternate(weight, stats, config, k, fit), signs=None)


def sparse_scalar_binary(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> Decomposition:
    """W_S + α ⊙ W_B with one factor α_i per row.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: `input_norms` d, [n].
        config: `ratio`, `pattern` and `iterations`.

    Raises:
        SlabError: the ratio leaves no entry, or the pattern does not divide n.
    """
    m, n = weight.shape
    k = kept_per_row((m, n), config, rank=1, signs=True)

    def fit(residual: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factors = torch.abs(residual, out=scratch).mean(dim=1, keepdim=True)
        return factors, factors.new_ones(1, n), torch.copysign(factors, residual)

    return alternate(weight, stats, config, k, fit)
