"""One-shot pruners: keep the k best entries of every row unchanged, drop the rest.

- magnitude: score |W|.
- Wanda (Sun et al. 2023, arXiv 2306.11695): score |W| · d with d the norms of the calibration inputs.

Both compare within a row, (1, n), as Wanda does. Classical magnitude pruning compares within the whole matrix, which
would not give rows of equal length.
"""

from __future__ import annotations

from torch import Tensor

from slablm.config import CompressionConfig
from slablm.methods.budget import kept_per_row
from slablm.methods.decomposition import Decomposition, LayerStats
from slablm.methods.select import kept_entries, top_k_mask


def magnitude(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> Decomposition:
    """Prune by |W|.

    Args:
        weight: [m, n].
        stats: not used; every method has the same signature.
        config: `ratio` and `pattern`.
    """
    return _prune(weight, weight.float().abs(), config)


def wanda(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> Decomposition:
    """Prune by |W| · d.

    Args:
        weight: [m, n].
        stats: `input_norms`, [n].
        config: `ratio` and `pattern`.
    """
    return _prune(weight, weight.float().abs() * stats.input_norms.to(weight.device), config)


def _prune(weight: Tensor, scores: Tensor, config: CompressionConfig) -> Decomposition:
    m, n = weight.shape
    k = kept_per_row((m, n), config, rank=0, signs=False)
    mask = top_k_mask(scores, k, config.n_of_m)
    weight = weight.float()
    return Decomposition(
        mask=mask,
        values=kept_entries(weight, mask, k),
        left=weight.new_empty(m, 0),
        right=weight.new_empty(0, n),
        signs=None,
    )
