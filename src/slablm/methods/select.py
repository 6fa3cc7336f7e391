"""Which entries survive: the k largest scores of every row, ties to the lower column.

A full sort would cost more than all the rest of SLaB. The k-th largest score of a row is enough: everything above it
survives, and only rows in which it occurs more than once need a closer look. On the CPU that threshold comes from
numpy's `partition` (a vectorised introselect, about 1 ns per entry, five times faster than torch.topk there).

N:M patterns rank each entry inside its group of M by M (M − 1) / 2 comparisons, again without sorting.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from slablm.config import Pattern


def top_k_mask(scores: Tensor, k: int, pattern: Pattern | None = None) -> Tensor:
    """The k best entries of every row.

    Args:
        scores: non-negative, finite, [m, n] float32.
        k: entries to keep per row, 1 ≤ k ≤ n (with a pattern: at most n · N / M).
        pattern: N:M restriction applied first; the k best are then chosen among the survivors.

    Returns:
        [m, n] bool with exactly k True per row; equal scores are taken from the left.
    """
    if pattern is not None:
        scores = scores.masked_fill(~group_mask(scores, pattern), -1.0)
    threshold = kth_largest(scores, k)
    mask = scores >= threshold
    if torch.count_nonzero(mask) != k * scores.shape[0]:
        _drop_surplus_ties(mask, scores, threshold, k)
    return mask


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest score of every row, [m, 1]."""
    n = scores.shape[1]
    if scores.device.type == "cpu":
        partitioned = np.partition(scores.numpy(), n - k, axis=1)
        return torch.from_numpy(partitioned[:, n - k : n - k + 1].copy())
    return torch.kthvalue(scores, n - k + 1, dim=1, keepdim=True).values


def group_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """The N best of every M consecutive entries, [m, n] bool; ties go to the left.

    Args:
        scores: [m, n], n a multiple of M.
        pattern: N and M.
    """
    m, n = scores.shape
    groups = scores.view(m, n // pattern.group, pattern.group).permute(2, 0, 1).contiguous()
    beaten_by = torch.zeros(groups.shape, dtype=torch.uint8, device=scores.device)
    for i in range(pattern.group):
        for j in range(i + 1, pattern.group):
            left_wins = groups[i] >= groups[j]
            beaten_by[j] += left_wins
            beaten_by[i] += ~left_wins
    return (beaten_by < pattern.survivors).permute(1, 2, 0).reshape(m, n)


def _drop_surplus_ties(mask: Tensor, scores: Tensor, threshold: Tensor, k: int) -> None:
    """Clear, in place, the rightmost entries equal to the threshold until every row keeps k."""
    rows = torch.nonzero(mask.sum(dim=1) > k).squeeze(1)
    above = scores[rows] > threshold[rows]
    tied = mask[rows] & ~above
    room = k - above.sum(dim=1, keepdim=True)
    mask[rows] = above | (tied & (tied.cumsum(dim=1) <= room))
