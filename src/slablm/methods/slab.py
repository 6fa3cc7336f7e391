"""SLaB: sparse plus low-rank ⊙ binary (arXiv 2604.04493).

    W ≈ W_S + W_L ⊙ W_B

Alternating minimisation of ‖W − W_S − W_L ⊙ W_B‖, s rounds from W_L ⊙ W_B = 0:

1. Y = W − W_L ⊙ W_B. Keep, in every row, the k entries with the largest score |Y| · d; W_S is Y there, 0 elsewhere.
2. R = W − W_S, W_B = sign(R) with sign(0) = +1.
3. W_L = the best rank-r approximation of |R|. As W_B is ±1, ‖R − W_L ⊙ W_B‖_F = ‖|R| − W_L‖_F, so this is
   Eckart–Young on |R|.

Rank 1 needs no SVD. |R| is non-negative, so its leading singular vectors are too (Perron–Frobenius) and are far
ahead of the rest; a few power iterations, started from the round before, follow them. For r > 1 the same idea is a
block power iteration on a slightly wider subspace.

Between rounds everything lives in four [m, n] buffers that are updated in place. W_S never appears: step 2 is
R = W − mask ⊙ Y. The loop is `alternate`; step 3 is a function it is given, so that the arms of the ablation share it.

On a GPU the host never waits for the device, so all rounds of a layer are launched in one go. (Rank 1; for r > 1
torch's SVD reads its error code in every round.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slablm.config import CompressionConfig
from slablm.methods.budget import kept_per_row
from slablm.methods.decomposition import Decomposition, LayerStats, low_rank
from slablm.methods.select import kept_entries, top_k_mask

# Warm-started, three steps per round agree with the SVD to about 1e-5 in the error (tests/methods/test_slab.py).
POWER_STEPS = 3
# A block power iteration converges with the gap behind its last column: a few spare columns buy that gap.
OVERSAMPLING = 6

Fit = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def slab(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> Decomposition:
    """Decompose one weight.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: `input_norms` d, [n].
        config: `ratio`, `pattern`, `rank` and `iterations`.

    Raises:
        SlabError: the ratio leaves no entry, or the pattern does not divide n.
    """
    m, n = weight.shape
    rank = min(config.rank, m, n)
    k = kept_per_row((m, n), config, rank=rank, signs=True)
    basis = start_basis(weight.float(), rank)

    def fit(residual: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal basis
        left, right, basis = leading_factors(torch.abs(residual, out=scratch), basis, rank)
        return left, right, _signed(low_rank(left, right), residual)

    return alternate(weight, stats, config, k, fit)


def alternate(weight: Tensor, stats: LayerStats, config: CompressionConfig, k: int, fit: Fit) -> Decomposition:
    """The loop: choose W_S, fit the rest, and again.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: `input_norms` d, [n].
        config: `pattern` and `iterations`.
        k: entries to keep per row.
        fit: step 3. Given R = W − W_S and a buffer to write to, both [m, n], it returns left [m, r], right [r, n] and
            their background W_L ⊙ W_B (or W_L alone), a new [m, n].

    Returns:
        The decomposition, with the signs of R. A fit whose background does not use them has to drop them.
    """
    # + 0.0 turns −0.0 into +0.0, so that copysign in a fit means sign(0) = +1.
    weight = weight.float() + 0.0
    norms, pattern = stats.input_norms.to(weight), config.n_of_m
    background = torch.zeros_like(weight)  # W_L ⊙ W_B
    residual = torch.empty_like(weight)  # first Y, then R
    scratch = torch.empty_like(weight)  # first the scores, then the fit's
    for _ in range(config.iterations):
        torch.sub(weight, background, out=residual)
        torch.abs(residual, out=scratch).mul_(norms)
        mask = top_k_mask(scratch, k, pattern)
        torch.addcmul(weight, mask.to(weight.dtype), residual, value=-1, out=residual)
        previous = background
        left, right, background = fit(residual, scratch)
    # W_S is W − the background before the last round; the folded value adds the new one.
    values = kept_entries(weight - previous + background, mask, k)
    return Decomposition(mask=mask, values=values, left=left, right=right, signs=residual < 0)


def _signed(low_rank_matrix: Tensor, residual: Tensor) -> Tensor:
    """W_L ⊙ sign(R), in place; W_L may be negative when its rank is above 1."""
    one = torch.ones((), device=residual.device)
    signed: Tensor = low_rank_matrix.mul_(torch.copysign(one, residual))
    return signed


def start_basis(weight: Tensor, rank: int) -> Tensor:
    """Where the first power iteration starts, [n, r] or wider: column norms, and a fixed random block beside them."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=0, keepdim=True).T
    if rank == 1:
        return norms
    width = min(rank + OVERSAMPLING, *weight.shape) - 1
    # A generator of its own: the result must not depend on, or disturb, the global random state.
    noise = torch.randn(weight.shape[1], width, generator=torch.Generator().manual_seed(0))
    return torch.cat([norms, noise.to(norms)], dim=1)


def leading_factors(magnitude: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-r approximation of |R| by warm-started power iteration.

    Args:
        magnitude: |R|, [m, n]; for r > 1 it may have negative entries.
        basis: right subspace of the round before, [n, q] with q ≥ r.
        rank: r.

    Returns:
        left [m, r] and right [r, n], each carrying the square root of the singular values so that both stay well
        inside the range of 16-bit floats; and the subspace to start the next round from, [n, q].
    """
    if rank == 1:
        return _leading_pair(magnitude, basis)
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(magnitude.T @ (magnitude @ basis)).Q
    image = magnitude @ basis
    u, s, vt = torch.linalg.svd(image, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * (vt[:rank] @ basis.T), basis


def _leading_pair(magnitude: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`leading_factors` for r = 1: u σ vᵀ with u, v ≥ 0."""
    tiny = torch.finfo(magnitude.dtype).tiny
    for _ in range(POWER_STEPS):
        left = magnitude @ right
        left /= torch.linalg.vector_norm(left).clamp_min(tiny)
        right = magnitude.T @ left  # carries σ
    sigma = torch.linalg.vector_norm(right)
    root = sigma.sqrt()
    return left * root, (right / root.clamp_min(tiny)).T, right / sigma.clamp_min(tiny)
