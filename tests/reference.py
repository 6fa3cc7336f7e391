"""Slow, literal versions of the mathematics: the truth that the fast code is compared with."""

from __future__ import annotations

import torch


def top_k(scores, k, pattern=None):
    """The k best of every row by a stable full sort; with (N, M) only the N best of every M may be chosen."""
    scores = scores.clone()
    if pattern is not None:
        survivors, group = pattern
        for row in scores:
            for start in range(0, len(row), group):
                order = sorted(range(group), key=lambda i: (-row[start + i].item(), i))
                for i in order[survivors:]:
                    row[start + i] = -1
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def slab(weight, norms, k, rank=1, iterations=20, pattern=None):
    """SLaB step by step as in the paper, with a full SVD; returns Ŵ and the mask."""
    weight = weight.double()
    low_rank_signed = torch.zeros_like(weight)
    for _ in range(iterations):
        rest = weight - low_rank_signed
        mask = top_k(rest.abs() * norms.double(), k, pattern)
        sparse = torch.where(mask, rest, 0.0)
        residual = weight - sparse
        signs = torch.where(residual >= 0, 1.0, -1.0).double()
        u, s, vt = torch.linalg.svd(residual.abs(), full_matrices=False)
        low_rank_signed = (u[:, :rank] * s[:rank]) @ vt[:rank] * signs
    return sparse + low_rank_signed, mask


def drift(dense, compressed):
    """‖H' − H‖ / ‖H‖ of lists of windows [tokens, hidden], number by number: (first tokens, all others)."""
    change, size = [0.0, 0.0], [0.0, 0.0]
    for before, after in zip(dense, compressed, strict=True):
        for token, (old_row, new_row) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
            for old, new in zip(old_row, new_row, strict=True):
                change[token > 0] += (new - old) ** 2
                size[token > 0] += old**2
    return tuple((c / s) ** 0.5 if s else 0.0 for c, s in zip(change, size, strict=True))
