"""SLaB with weighted factors, error feedback and few-bit values: ``slab+``.

The form is SLaB's, Ŵ = kept entries, ± u_i v_j elsewhere. What differs is how it is found, and how the kept entries are
stored. With G = XᵀX the output error of a weight is ‖(W − Ŵ) Xᵀ‖²_F = tr (W − Ŵ) G (W − Ŵ)ᵀ; SLaB only looks at the
diagonal, d_j² = G_jj, and only to choose what is kept.

1. *Weighted factors.* The rounds of SLaB, but u vᵀ minimises Σ d_j² (|R_ij| − u_i v_j)²: the rank-1 approximation of
   |R| · d, with v divided by d afterwards.
2. *Grid.* Kept entries become a sign and a few bits of magnitude (`grid`); with 16 bits they stay as they are.
3. *Error feedback.* One column sweep (`sweep`) over the columns in order of falling d. A column becomes, entry by
   entry, its nearest grid point where it is kept and ± u_i v_j where not, and the columns to come make up for the
   error. Each row keeps as many entries of a block of columns as step 1 gave it there, but chooses them anew when the
   sweep gets there: those whose keeping lowers (w − ŵ)² / U_jj² most.
4. *Refit.* With positions, signs and kept entries fixed, the error is quadratic in u and in v, each solved exactly:

       u_i = t_i G b_i / b_i G b_i,              b_i the row of ± v_j where not kept, t_i the row of W − kept entries
       (G ⊙ PᵀP) v = Σ_i p_i ⊙ (t_i G),          p_i the row of ± u_i where not kept

5. *Descent.* `DESCENTS` times: every entry is looked at again with all others known (`descent`), by the rules of step
   3, then u and v are fitted again. Of all steps after the first sweep this gives most.
6. *Held-out choice.* G is an estimate from some tokens; feedback fits their noise too. On some rows, drawn at random,
   steps 3 to 5 are tried with each of `DAMPINGS`; what wins is done with all rows, and is the result if its error on
   tokens that were held back is less than that of steps 1 and 2 alone. So on those tokens feedback never does harm.

A budget in true bits (`CompressionConfig.bits_per_weight`) leaves open how many entries are kept, and in how many bits:
few fine ones or many coarse ones. The fewest bits with which a share in `SENSIBLE` is kept are tried, and one and two
more, on the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slablm.config import LARGEST_BUDGET, CompressionConfig
from slablm.errors import SlabError
from slablm.methods.budget import coded_bytes, kept_per_row, kept_within
from slablm.methods.decomposition import Decomposition, LayerStats, low_rank
from slablm.methods.descent import descent_sweep
from slablm.methods.grid import LARGEST_BITS, ValueGrid, fit_grid
from slablm.methods.results import QuantizedWeight
from slablm.methods.select import kept_columns
from slablm.methods.slab import alternate, leading_factors, start_basis
from slablm.methods.sweep import BLOCK_SIZE, Block, Plan, column_sweep, required_gram

# Shares of the mean diagonal that are added to G: little trust in G, and more. Forms are compared with the first.
DAMPINGS = (0.1, 0.01)
DESCENTS = 4
# Share of kept entries that a budget may lead to, and how many numbers of bits are tried within it.
SENSIBLE = (0.2, 0.97)
MOST_TRIED = 3
SAMPLED_ROWS = 64
# Of the mean diagonal of the matrix that is solved for v.
_REFIT_DAMPING = 1e-4


@dataclass(frozen=True)
class Form:
    """How a weight is stored: entries k kept per row, and bits of a magnitude (None for values in 16 bits)."""

    kept: int
    bits: int | None


def weighted_slab(weight: Tensor, norms: Tensor, stats: LayerStats, config: CompressionConfig, k: int) -> Decomposition:
    """Step 1: SLaB with factors that are fitted where the inputs are large.

    Args:
        weight: W, [m, n] float32.
        norms: d, [n], positive.
        stats: for the selection.
        config: `pattern` and `iterations`.
        k: entries to keep per row.
    """
    basis = start_basis(weight * norms, 1)

    def fit(residual: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal basis
        magnitude = torch.abs(residual, out=scratch).mul_(norms)
        left, right, basis = leading_factors(magnitude, basis, 1)
        right = right / norms
        return left, right, torch.copysign(low_rank(left, right), residual)

    return alternate(weight, stats, config, k, fit)


def slab_plus(weight: Tensor, stats: LayerStats, config: CompressionConfig) -> Decomposition:
    """Decompose one weight.

    Args:
        weight: W, [m, n]; computed in float32 whatever its dtype.
        stats: `gram`, and `held_out`, the Gram matrix of tokens that are not in `gram`. Without the latter there is no
            feedback.
        config: `ratio` or `bits_per_weight`, `pattern`, `iterations`, `magnitude_bits`, `group_size` and `seed`.

    Raises:
        SlabError: the budget leaves no entry, the pattern does not divide n, a Gram matrix is missing or not finite, or
            a value does not fit into an FP16 scale.
    """
    weight = weight.float()
    gram, held_out = required_gram(stats, "slab+"), stats.held_out
    forms = possible_forms((weight.shape[0], weight.shape[1]), config)
    if held_out is None:
        return closed_form(weight, gram, config, forms[0])
    sample = weight[trial_rows(len(weight), config.seed).to(weight.device)]
    form, damping = _best_trial(sample, gram, held_out, config, forms)
    plain = closed_form(weight, gram, config, form)
    best = fed(weight, gram, plain, damping, choose=config.n_of_m is None)
    return best if output_error(weight, best, held_out) < output_error(weight, plain, held_out) else plain


def trial_rows(m: int, seed: int) -> Tensor:
    """Which of m rows the trials look at: `SAMPLED_ROWS` of them at random, or all; ascending, int64 on the CPU.

    Not every so many-th row: a stride that divides the size of a head finds the same channel of all heads, in a q_proj
    one pair of the rotary embedding.
    """
    # A generator of its own, on the CPU: the same rows on every device and every rank.
    return torch.randperm(m, generator=torch.Generator().manual_seed(seed))[:SAMPLED_ROWS].sort().values


def _best_trial(
    sample: Tensor, gram: Tensor, held_out: Tensor, config: CompressionConfig, forms: list[Form]
) -> tuple[Form, float]:
    """The form and the damping with the smallest error of some rows on held-out tokens: first the one, then the other.

    Args:
        sample: rows of W, [s, n].
        gram: G, [n, n].
        held_out: of the tokens that decide, [n, n].
        config: as for `slab_plus`.
        forms: what to choose from.
    """
    starts = {form: closed_form(sample, gram, config, form) for form in forms}

    def error(form: Form, damping: float) -> float:
        result = fed(sample, gram, starts[form], damping, choose=config.n_of_m is None)
        return output_error(sample, result, held_out)

    errors = {(form, DAMPINGS[0]): error(form, DAMPINGS[0]) for form in forms}
    form, _ = min(errors, key=errors.__getitem__)
    errors |= {(form, damping): error(form, damping) for damping in DAMPINGS[1:]}
    return min(errors, key=errors.__getitem__)


def possible_forms(shape: tuple[int, int], config: CompressionConfig) -> list[Form]:
    """What the budget can be spent on.

    Raises:
        SlabError: nothing would be kept, or the pattern does not divide n.
    """
    bits = config.magnitude_bits
    if config.bits_per_weight is None:
        return [Form(kept_per_row(shape, config, rank=1, signs=True), bits)]
    budget, group_size = config.bits_per_weight, config.group_size
    forms = [
        Form(k, b)
        for b in (range(1, LARGEST_BITS + 1) if bits is None else (bits,))
        if (k := kept_within(shape, budget, b, group_size))
    ]
    if not forms:
        least = 8 * coded_bytes(shape, 1, bits or 1, group_size) / (shape[0] * shape[1])
        raise SlabError(
            f"{budget} bits per weight keep no entry of a weight with shape {shape[0]}x{shape[1]}: use "
            f"at least {math.ceil(100 * least) / 100}, or ignore this layer"
        )
    least_share, largest_share = SENSIBLE
    return [form for form in forms if least_share <= form.kept / shape[1] <= largest_share][:MOST_TRIED] or forms[-1:]


def sensible_budgets(shape: tuple[int, int], group_size: int) -> tuple[float, float]:
    """Fewest and most true bits per weight at which the form makes sense, none beyond what the settings allow.

    Args:
        shape: (m, n).
        group_size: columns that share a scale.
    """
    (m, n), (least_share, largest_share) = shape, SENSIBLE
    least = coded_bytes(shape, math.ceil(least_share * n), 1, group_size)
    most = coded_bytes(shape, math.floor(largest_share * n), LARGEST_BITS, group_size)
    return 8 * least / (m * n), min(8 * most / (m * n), LARGEST_BUDGET)


def closed_form(weight: Tensor, gram: Tensor, config: CompressionConfig, form: Form) -> Decomposition:
    """Steps 1 and 2."""
    norms = positive(gram.diagonal().sqrt())
    start = weighted_slab(weight, norms, LayerStats(norms, 1, weight[:0]), config, form.kept)
    if form.bits is None:
        return start
    grid = fit_grid(start.dense(), start.mask, norms, form.bits, config.group_size)
    return on_grid(start, grid)


def fed(weight: Tensor, gram: Tensor, start: Decomposition, damping: float, *, choose: bool) -> Decomposition:
    """Steps 3 to 5.

    Args:
        weight: W, [m, n] float32.
        gram: G, [n, n].
        start: gives u v, the grid if there is one, and how many entries each row keeps of which columns.
        damping: share of the mean diagonal that is added to G.
        choose: whether positions are chosen anew within a block of columns (they must not where a pattern binds them).
    """
    trusted = damped(gram, damping)
    result = refit(weight, feedback(weight, gram, start, damping, choose=choose), trusted)
    for _ in range(DESCENTS):
        result = refit(weight, descent(weight, trusted, result, choose=choose), trusted)
    return result


def positive(norms: Tensor) -> Tensor:
    """Norms with those of dead inputs raised to the smallest of the others: they are divided by."""
    live = norms[norms > 0]
    return norms.clamp_min(live.min()) if len(live) else torch.ones_like(norms)


def damped(gram: Tensor, damping: float) -> Tensor:
    """G + damping · mean(diag) · I."""
    result = gram.clone()
    result.diagonal().add_(damping * gram.diagonal().mean())
    return result


def output_error(weight: Tensor, approximation: Decomposition | QuantizedWeight, gram: Tensor) -> float:
    """Tr (W − Ŵ) G (W − Ŵ)ᵀ."""
    difference = weight - approximation.dense()
    return ((difference @ gram.to(weight)) * difference).sum().item()


def on_grid(start: Decomposition, grid: ValueGrid) -> Decomposition:
    """Step 2: kept entries rounded to the grid."""
    columns = kept_columns(start.mask, start.kept)
    magnitudes = grid.nearest(start.values.abs(), columns)
    return replace(start, values=torch.copysign(magnitudes, start.values), grid=grid)


def feedback(weight: Tensor, gram: Tensor, start: Decomposition, damping: float, *, choose: bool) -> Decomposition:
    """Step 3: the sweep with error feedback; arguments as of `fed`."""
    order = gram.diagonal().argsort(descending=True, stable=True)
    background, mask = low_rank(start.left, start.right)[:, order], start.mask[:, order]
    plan = _plan(background, mask, start.grid, order, choose=choose)
    swept = column_sweep(weight[:, order], gram[order][:, order], plan, BLOCK_SIZE, damping)
    back = order.argsort()
    return _from_dense(start, swept[:, back], mask[:, back])


def descent(weight: Tensor, gram: Tensor, start: Decomposition, *, choose: bool) -> Decomposition:
    """Step 5, without the refit: one sweep of coordinate descent; arguments as of `fed`, but a damped G."""
    background, mask = low_rank(start.left, start.right), start.mask.clone()
    plan = _plan(background, mask, start.grid, torch.arange(len(gram), device=gram.device), choose=choose)
    return _from_dense(start, descent_sweep(weight, start.dense(), gram, plan), mask)


def _plan(background: Tensor, mask: Tensor, grid: ValueGrid | None, order: Tensor, *, choose: bool) -> Plan:
    """What a column becomes in either sweep.

    Args:
        background: |u v| in the order of the sweep, [m, n].
        mask: kept positions in the same order, [m, n] bool; those that are chosen anew are written into it.
        grid: of the kept entries.
        order: the column of the weight behind each column of the sweep, [n].
        choose: see `fed`.
    """

    def rounded(current: Tensor, columns: slice) -> Tensor:
        if grid is None:
            return current
        return torch.copysign(grid.nearest(current.abs(), order[columns]), current)

    def plan(block: Block) -> Callable[[int], Tensor]:
        columns = slice(block.start, block.start + block.weight.shape[1])
        if choose:
            mask[:, columns] = _choose(block, background[:, columns], rounded(block.weight, columns), mask[:, columns])

        def replace_column(j: int) -> Tensor:
            column, at = block.weight[:, j], slice(block.start + j, block.start + j + 1)
            kept = rounded(column[:, None], at)[:, 0]
            return torch.where(mask[:, at][:, 0], kept, torch.copysign(background[:, at][:, 0], column))

        return replace_column

    return plan


def _from_dense(start: Decomposition, dense: Tensor, mask: Tensor) -> Decomposition:
    """A decomposition with other kept entries and signs."""
    return replace(start, mask=mask, values=dense[mask].view(len(dense), start.kept), signs=dense < 0)


def _choose(block: Block, background: Tensor, rounded: Tensor, mask: Tensor) -> Tensor:
    """Of every row, as many entries as `mask` has there: those whose keeping helps most, [m, b] bool."""
    lost = (block.weight.abs() - background).square()
    kept = (block.weight - rounded).square()
    gain = (lost - kept) / block.diagonal.square()
    rank = gain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < mask.sum(dim=1, keepdim=True)


def refit(weight: Tensor, start: Decomposition, gram: Tensor) -> Decomposition:
    """Step 4: the best u, the best v for it, and the best u for that.

    Args:
        weight: W, [m, n] float32.
        start: positions, signs and kept entries stay.
        gram: G, [n, n], positive definite.
    """
    assert start.signs is not None
    one = torch.ones((), device=weight.device)
    signs = torch.where(start.signs, -one, one) * ~start.mask
    kept = torch.zeros_like(weight).masked_scatter_(start.mask, start.values)
    wanted = (weight - kept) @ gram
    left, right = start.left[:, 0].float(), start.right[0].float()
    left = _best_left(wanted, signs * right, gram, left)
    parts = signs * left[:, None]
    system = gram * (parts.T @ parts)
    system.diagonal().add_(_REFIT_DAMPING * system.diagonal().mean().clamp_min(torch.finfo(weight.dtype).tiny))
    right = torch.linalg.solve(system, (parts * wanted).sum(dim=0))
    left = _best_left(wanted, signs * right, gram, left)
    # Factors stay non-negative, as in the paper: a minus in u v is one in the signs.
    minus = ((left < 0)[:, None] ^ (right < 0)) & ~start.mask
    return replace(start, left=left.abs()[:, None], right=right.abs()[None], signs=start.signs ^ minus)


def _best_left(wanted: Tensor, patterns: Tensor, gram: Tensor, otherwise: Tensor) -> Tensor:
    """Least-squares u, [m]; rows without anything to fit keep what they have."""
    norms = ((patterns @ gram) * patterns).sum(dim=1)
    fitted = (wanted * patterns).sum(dim=1) / norms
    return torch.where(norms > 0, fitted, otherwise)
