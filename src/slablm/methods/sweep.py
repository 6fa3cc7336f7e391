"""One sweep over the columns with error feedback: what SparseGPT and GPTQ have in common.

Changing a weight changes the layer's output. Optimal Brain Surgeon says how the weights that are still free make up
for it. For one row w with H = XᵀX, let F be the columns not fixed yet and j the first of them. Fixing w_j at q costs
(w_j − q)² / [H_F⁻¹]_jj, and the best answer of the others is

    w_F  ←  w_F − (w_j − q) / [H_F⁻¹]_jj · [H_F⁻¹]_j,:

Going from left to right in every row makes F, and so H_F⁻¹, the same for all rows. All of these inverses are contained
in one upper triangular matrix U with H⁻¹ = UᵀU (Frantar & Alistarh 2023, arXiv 2301.00774; Frantar et al. 2022, arXiv
2210.17323):

    [H_F⁻¹]_jj = U_jj²,      [H_F⁻¹]_j,: = U_jj · U_j,F

so with e = (w_j − q) / U_jj the update is w_F ← w_F − e · U_j,F. It is applied at once to the rest of a block of
columns. The papers get U from Cholesky, inverse, Cholesky, and apply it to all columns behind the block as well.

None of H has to be inverted. Let H = R Rᵀ with R upper triangular (Cholesky in reversed column order), so that
U = R⁻¹, and Δ what a row has lost so far. Its output error Δ H Δᵀ = ‖Δ R‖² is a sum over columns, of which the ones
of a block B are zero if what has been lost before it, in the columns A, is made up for by

    Δ_B = − Δ_A R_AB R_BB⁻¹

whatever comes behind. So a block starts at w_B + Δ_A R_AB U_BB when its turn comes, where U_BB, the inverse of the
small R_BB, is at the same time all that is needed of U inside the block. In exact arithmetic nothing is different.
(That feedback needs no inverse: Chee et al. 2023, arXiv 2307.13304.)

What the columns become is the caller's affair. A *plan* settles block after block, each as it is with all errors so far
fed into it: so a mask can be settled per block, a scale per group, a code per column (`by_column`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slablm.errors import SlabError
from slablm.methods.cholesky import upper_factor
from slablm.methods.decomposition import LayerStats

BLOCK_SIZE = 128
DAMPING = 0.01
# A Gram matrix that is not positive definite at the damping asked for gets ten and then a hundred times as much.
DAMPING_STEPS = (1, 10, 100)


@dataclass(frozen=True)
class Block:
    """The columns the sweep is working on, and how one of them that becomes q_j moves those to its right.

    e_j = (before_j − q_j) / divisors_j, and then w_l ← w_l − coefficients_jl · e_j for all l > j.

    Attributes:
        weight: current weights, [m, b].
        diagonal: [b]. (difference / diagonal)² is what a difference to a current weight costs.
        start: index of the first of these columns in the whole weight.
        coefficients: [b, b], of which only what is above the diagonal counts.
        divisors: [b].
        before: what the new columns are compared with, [b, m]; None for the current weights.
    """

    weight: Tensor
    diagonal: Tensor
    start: int
    coefficients: Tensor
    divisors: Tensor
    before: Tensor | None = None


# Gives the new columns of a block, and their errors e, both [b, m].
Plan = Callable[[Block], tuple[Tensor, Tensor]]
Replace = Callable[[int], Tensor]


def by_column(plan: Callable[[Block], Replace]) -> Plan:
    """A plan that settles column after column.

    Args:
        plan: called with every block in order; returns the function that maps j, counted within the block, to the new
            column [m]. That function is called once for each j in ascending order. `Block.weight` is a live view:
            columns right of the one being replaced receive its error.
    """

    def settle(block: Block) -> tuple[Tensor, Tensor]:
        return fed_forward(block.weight.T, block.before, block.coefficients, block.divisors, plan(block))

    return settle


def fed_forward(
    current: Tensor, before: Tensor | None, coefficients: Tensor, divisors: Tensor, replace: Replace
) -> tuple[Tensor, Tensor]:
    """Replace column after column of a block; see `Block`.

    Args:
        current: current weights, [b, m]; they are moved.
        before: as in `Block`.
        coefficients: as in `Block`.
        divisors: as in `Block`.
        replace: see `by_column`.

    Returns:
        The new columns, and their errors, both [b, m].
    """
    before = current if before is None else before
    columns, errors = torch.empty_like(current), torch.empty_like(current)
    for j in range(len(current)):
        columns[j] = replace(j)
        torch.sub(before[j], columns[j], out=errors[j]).div_(divisors[j])
        current[j + 1 :].addr_(coefficients[j, j + 1 :], errors[j], alpha=-1)
    return columns, errors


def column_sweep(weight: Tensor, factor: Factor, plan: Plan, block_size: int = BLOCK_SIZE) -> Tensor:
    """Replace column after column and let the columns to the right make up for the error.

    Columns of dead inputs do not influence the output and start as zero.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        factor: of H, from `factored`.
        plan: settles the blocks; called with each in order.
        block_size: columns per block.

    Returns:
        The new weight, [m, n] float32.
    """
    triangle, n = factor.triangle.to(weight.device), weight.shape[1]
    # Transposed, a column is contiguous. clone: the caller's weight must survive, also where .T is a plain view.
    wanted = weight.float().T.clone(memory_format=torch.contiguous_format)
    wanted[factor.dead.to(weight.device)] = 0
    columns, lost = torch.empty_like(wanted), torch.empty_like(wanted)
    for start in range(0, n, block_size):
        stop = min(start + block_size, n)
        identity = torch.eye(stop - start, dtype=triangle.dtype, device=triangle.device)
        inner = torch.linalg.solve_triangular(triangle[start:stop, start:stop], identity, upper=True)
        current = torch.addmm(wanted[start:stop], inner.T, triangle[:start, start:stop].T @ lost[:start])
        columns[start:stop], _ = plan(Block(current.T, inner.diagonal(), start, inner, inner.diagonal()))
        lost[start:stop] = wanted[start:stop] - columns[start:stop]
    return columns.T.contiguous()


@dataclass(frozen=True)
class Factor:
    """What a sweep has to know of H.

    Attributes:
        triangle: R, upper triangular, [n, n] float32.
        dead: inputs that were always zero, [n] bool.
    """

    triangle: Tensor
    dead: Tensor


def factored(gram: Tensor, damping: float = DAMPING) -> Factor:
    """R, upper triangular with R Rᵀ = H = XᵀX + λ · mean(diag) · I.

    Dead inputs get the mean of the live diagonal, so that R does not depend on the scale of the Gram matrix in any
    other way than by a factor. (The papers' 1 does the same for their scale.)

    Args:
        gram: XᵀX up to a factor, [n, n]; computed in float32 whatever its dtype.
        damping: λ, a share of the mean diagonal; raised by `DAMPING_STEPS` as long as the factorisation fails.

    Raises:
        SlabError: the Gram matrix is not finite, or not positive definite even with the damping raised.
    """
    gram = gram.float()
    check_finite(gram)
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
    for step in DAMPING_STEPS:
        triangle = upper_factor(gram, dead * mean + step * damping * mean)
        if triangle is not None:
            return Factor(triangle, dead)
    raise SlabError(
        f"the Gram matrix of the calibration inputs is not positive definite, even with {step * damping:g} of its "
        "mean diagonal added: use more calibration windows, or a method that needs no Gram matrix"
    )


def falling(gram: Tensor) -> Tensor:
    """Columns in order of falling d, equal ones in their own order, [n]."""
    return gram.diagonal().argsort(descending=True, stable=True)


def damped(gram: Tensor, damping: float) -> Tensor:
    """G + damping · mean(diag) · I."""
    result = gram.clone()
    result.diagonal().add_(damping * gram.diagonal().mean())
    return result


def positive(norms: Tensor) -> Tensor:
    """Norms with those of dead inputs raised to the smallest of the others: they are divided by."""
    live = norms[norms > 0]
    return norms.clamp_min(live.min()) if len(live) else torch.ones_like(norms)


def check_finite(gram: Tensor) -> None:
    """A float32 sum of squares that overflowed shows up here first.

    Raises:
        SlabError: the Gram matrix holds infinity or NaN.
    """
    if not torch.isfinite(gram).all():
        raise SlabError("the Gram matrix of the calibration inputs holds infinity or NaN: load the model in float32")


def required_gram(stats: LayerStats, method: str) -> Tensor:
    """`stats.gram`.

    Args:
        stats: statistics of the layer.
        method: how the error calls the method.

    Raises:
        SlabError: it was not collected.
    """
    if stats.gram is None:
        raise SlabError(
            f"method {method!r} needs the Gram matrix of the calibration inputs: collect LayerStats.gram for every "
            "method that needs it"
        )
    return stats.gram
