"""Factors and scales by least squares on the output error, symbols fixed.

With G = XᵀX, the error of a weight is tr (W − Ŵ) G (W − Ŵ)ᵀ. Given all symbols it is quadratic in v, and, row by row,
in u_i and the scales s_i1, s_i2, … together:

- v:  Ŵ = K + P diag(v), with K the kept entries and P_ij = σ_ij u_i where c_ij = 0 and 0 elsewhere. The change δ of v
      solves (G ⊙ PᵀP) δ = Σ_i p_i ⊙ ((W − Ŵ) G)_i.
- rows:  ŵ = Σ_k x_k q_k with x = (s_1, …, u), q_g the pattern σ_ij a_c of a group and the last q that of σ_ij v_j. So
      x solves  (q_k G q_lᵀ) x = (w G q_kᵀ), a system with as many unknowns as the row has groups, and one. All of
      them together cost two products with G.

Solutions may be negative: then the minus goes into the signs, and u, v and s stay as non-negative as they were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from slablm.methods.alphabet import Alphabet

# Of the mean diagonal of the system that is solved for the change of v, and of each diagonal entry of those of rows.
_RIDGE, _ROW_RIDGE = 1e-4, 1e-6


@dataclass(frozen=True)
class Problem:
    """What is approximated, and how errors count.

    Attributes:
        weight: W, [m, n] float32.
        gram: G, [n, n] float32, positive definite.
    """

    weight: Tensor
    gram: Tensor

    @cached_property
    def pull(self) -> Tensor:
        """W G, [m, n]."""
        return self.weight @ self.gram


@dataclass(frozen=True)
class Draft:
    """A weight as symbols while it is being fitted.

    Attributes:
        codes: c, [m, n] uint8.
        signs: σ, ±1, [m, n] float32.
        alphabet: float32.
    """

    codes: Tensor
    signs: Tensor
    alphabet: Alphabet

    def dense(self) -> Tensor:
        """Ŵ, [m, n] float32."""
        return self.signs * self.alphabet.magnitudes(self.codes)


def drafted(approximation: Tensor, alphabet: Alphabet) -> Draft:
    """Symbols of a weight whose entries lie on an alphabet; [m, n] float32."""
    one = torch.ones((), device=approximation.device)
    return Draft(alphabet.nearest(approximation.abs()), torch.copysign(one, approximation), alphabet)


def refit(problem: Problem, draft: Draft) -> Draft:
    """The best v, then for every row the best u and scales, rounded to FP16."""
    draft = fitted_rows(problem, fitted_right(problem, draft))
    return replace(draft, alphabet=draft.alphabet.stored())


def fitted_right(problem: Problem, draft: Draft) -> Draft:
    """The best v."""
    inside, alphabet = draft.codes == 0, draft.alphabet
    parts = draft.signs * inside * alphabet.left[:, None]
    missing = problem.pull - draft.dense() @ problem.gram
    system = problem.gram * (parts.T @ parts)
    tiny = torch.finfo(system.dtype).tiny
    system.diagonal().add_(_RIDGE * system.diagonal().mean().clamp_min(tiny))
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        return draft
    change = torch.cholesky_solve((parts * missing).sum(dim=0)[:, None], factor)[:, 0]
    right = alphabet.right + change
    return Draft(draft.codes, flipped(draft.signs, inside & (right < 0)), replace(alphabet, right=right.abs()))


def fitted_rows(problem: Problem, draft: Draft) -> Draft:
    """The best u and s, all of a row together."""
    inside, alphabet = draft.codes == 0, draft.alphabet
    levels = functional.pad(alphabet.levels, (1, 0))[draft.codes.long()]
    kept, back = draft.signs * levels, draft.signs * inside * alphabet.right
    system, wanted = _row_systems(problem, kept, back, alphabet.group_size)
    diagonal = system.diagonal(dim1=1, dim2=2)
    free = diagonal > 0
    diagonal.mul_(1 + _ROW_RIDGE).add_((~free).to(diagonal))
    factor, failed = torch.linalg.cholesky_ex(system)
    found = torch.cholesky_solve(wanted[..., None], factor)[..., 0]
    before = torch.cat([alphabet.scales, alphabet.left[:, None]], dim=1)
    found = torch.where(free & (failed == 0)[:, None], found, before)
    scales, left = found[:, :-1], found[:, -1]
    minus = torch.where(inside, left[:, None] < 0, (scales < 0)[:, alphabet.groups()])
    fitted = replace(alphabet, scales=scales.abs(), left=left.abs())
    return Draft(draft.codes, flipped(draft.signs, minus), fitted)


def _row_systems(problem: Problem, kept: Tensor, back: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The systems of all rows, [m, G + 1, G + 1], and their right-hand sides, [m, G + 1]; unknown G is u.

    Args:
        problem: W and G.
        kept: σ a_c where kept, 0 elsewhere, [m, n].
        back: σ v where not kept, 0 elsewhere, [m, n].
        group_size: columns that share a scale.
    """

    def per_group(terms: Tensor) -> Tensor:
        padded = functional.pad(terms, (0, -terms.shape[1] % group_size))
        return padded.view(len(terms), -1, group_size).sum(dim=2)

    gram, image = problem.gram, back @ problem.gram
    wanted = torch.cat([per_group(problem.pull * kept), (problem.pull * back).sum(dim=1, keepdim=True)], dim=1)
    groups = wanted.shape[1] - 1
    system = wanted.new_zeros(*wanted.shape, groups + 1)
    system[:, groups, groups] = (image * back).sum(dim=1)
    system[:, groups, :groups] = system[:, :groups, groups] = per_group(image * kept)
    for g in range(groups):
        start = g * group_size
        own = slice(start, start + group_size)
        # The groups behind it only: the system is symmetric.
        products = per_group((kept[:, own] @ gram[own, start:]) * kept[:, start:])
        system[:, g, g:groups] = system[:, g:groups, g] = products
    return system, wanted


def flipped(signs: Tensor, minus: Tensor) -> Tensor:
    """Signs with those turned where `minus` is set."""
    return torch.where(minus, -signs, signs)
