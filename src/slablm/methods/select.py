"""Which entries survive: the k largest scores of every row, ties to the lower column.

A full sort would cost more than all the rest of SLaB. The k-th largest score of a row is enough: everything above it
survives, and only rows in which it occurs more than once need a closer look. On the CPU that threshold comes from
numpy's `partition` (a vectorised introselect, about 1 ns per entry, five times faster than torch.topk there).

On a GPU the host must never wait for a result: it would stop feeding the device, once per round and layer. So nothing
there looks at values to decide what to do next. Ties are resolved in every row, needed or not, and the kept entries
are gathered by their counted places instead of a search whose length only the device knows.

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
    if scores.device.type != "cpu":
        return _resolve_ties(scores, threshold, k)
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


def kept_entries(matrix: Tensor, mask: Tensor, k: int) -> Tensor:
    """The entries of each row where the mask is set, in column order.

    Args:
        matrix: [m, n].
        mask: [m, n] bool with exactly k True per row.
        k: entries per row.

    Returns:
        [m, k], same type.
    """
    if matrix.device.type == "cpu":
        return matrix[mask].view(len(matrix), k)
    return _gather_entries(matrix, mask, k)


def kept_columns(mask: Tensor, k: int) -> Tensor:
    """The columns of each row where the mask is set, ascending, [m, k] int64."""
    columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    return kept_entries(columns, mask, k)


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


def _gather_entries(matrix: Tensor, mask: Tensor, k: int) -> Tensor:
    """`kept_entries` by counting: every kept entry knows its place, all others go to a place of their own, the last."""
    place = (mask.cumsum(dim=1) - 1).masked_fill_(~mask, k)
    return matrix.new_empty(len(matrix), k + 1).scatter_(1, place, matrix)[:, :k].contiguous()


def _drop_surplus_ties(mask: Tensor, scores: Tensor, threshold: Tensor, k: int) -> None:
    """Clear, in place, the rightmost entries equal to the threshold until every row keeps k."""
    rows = torch.nonzero(mask.sum(dim=1) > k).squeeze(1)
    mask[rows] = _resolve_ties(scores[rows], threshold[rows], k)


def _resolve_ties(scores: Tensor, threshold: Tensor, k: int) -> Tensor:
    """All entries above the threshold, and from the left as many equal to it as make k per row."""
    above, tied = scores > threshold, scores == threshold
    room = k - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= room))
