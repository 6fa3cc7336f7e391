from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.methods.alphabet_fit import fit_alphabet
from slablm.methods.alphabet_refit import Problem, drafted, fitted_right, fitted_rows, flipped, refit

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 20))


def draft_of(m, n, bits, group_size, seed):
    """A weight, a Gram matrix, and symbols that were rounded without looking at it, some signs turned."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * n + 3, n, generator=generator) @ torch.randn(n, n, generator=generator)
    gram = inputs.T @ inputs / n
    gram.diagonal().add_(0.05 * gram.diagonal().mean())
    weight = torch.randn(m, n, generator=generator)
    alphabet = fit_alphabet(weight, gram.diagonal(), bits, group_size)
    turned = torch.where(torch.rand(m, n, generator=generator) < 0.05, -weight, weight)
    start = torch.copysign(alphabet.magnitudes(alphabet.nearest(weight.abs())), turned)
    return Problem(weight, gram), drafted(start, alphabet)


def slow_error(problem, dense):
    difference = (problem.weight - dense).double()
    return sum((row[:, None] * problem.gram.double() * row[None]).sum().item() for row in difference)


def least(problem, row, patterns, fixed):
    """The smallest error of a row over x, for ŵ = fixed + x · patterns, by a dense least-squares solver."""
    root = torch.linalg.cholesky(problem.gram.double()).T  # G = rootᵀ root: ‖root e‖² is the error of e
    target = root @ (problem.weight[row].double() - fixed)
    design = root @ patterns.double().T
    x = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution[:, 0]
    return (target - design @ x).square().sum().item()


@given(SHAPES, st.integers(2, 5), st.integers(1, 9), st.integers(0, 1000))
def test_rows_are_the_least_squares_solution(shape, bits, group_size, seed):
    problem, draft = draft_of(*shape, bits, group_size, seed)
    fitted = fitted_rows(problem, draft)
    assert torch.equal(fitted.codes, draft.codes)
    assert (fitted.alphabet.scales >= 0).all()
    assert (fitted.alphabet.left >= 0).all()
    groups = torch.arange(shape[1]) // group_size
    for i in range(shape[0]):
        kept = draft.codes[i] > 0
        levels = torch.where(kept, draft.alphabet.levels[(draft.codes[i].long() - 1).clamp_min(0)], 0.0)
        patterns = [draft.signs[i] * levels * (groups == g) for g in range(int(groups.max()) + 1)]
        patterns.append(draft.signs[i] * draft.alphabet.right * ~kept)
        best = least(problem, i, torch.stack(patterns), torch.zeros(shape[1]).double())
        difference = (problem.weight[i] - fitted.dense()[i]).double()
        found = (difference @ problem.gram.double() @ difference).item()
        total = (problem.weight[i].double() @ problem.gram.double() @ problem.weight[i].double()).item()
        assert found == pytest.approx(best, rel=1e-3, abs=1e-5 * total)


@given(SHAPES, st.integers(2, 5), st.integers(1, 9), st.integers(0, 1000))
def test_right_is_the_least_squares_solution(shape, bits, group_size, seed):
    problem, draft = draft_of(*shape, bits, group_size, seed)
    fitted = fitted_right(problem, draft)
    assert (fitted.alphabet.right >= 0).all()
    # All rows below each other are one long row: one pattern per column.
    m, n = shape
    long = Problem(problem.weight.reshape(1, -1), torch.block_diag(*[problem.gram] * m))
    background = draft.signs * (draft.codes == 0) * draft.alphabet.left[:, None]
    kept = (draft.dense() * (draft.codes > 0)).double().reshape(-1)
    patterns = torch.stack([(background * (torch.arange(n) == j)).reshape(-1) for j in range(n)])
    best = least(long, 0, patterns, kept)
    before, total = slow_error(problem, draft.dense()), slow_error(problem, torch.zeros(shape))
    found = slow_error(problem, fitted.dense())
    assert found <= before * (1 + 1e-4) + 1e-6 * total
    # Ridge: as good as the best up to a small share of what there was to gain.
    assert found == pytest.approx(best, rel=3e-2, abs=1e-2 * (before - best) + 1e-5 * total)


@given(SHAPES, st.integers(2, 5), st.integers(1, 9), st.integers(0, 1000))
def test_refit_never_raises_the_error_beyond_rounding(shape, bits, group_size, seed):
    problem, draft = draft_of(*shape, bits, group_size, seed)
    before, total = slow_error(problem, draft.dense()), slow_error(problem, torch.zeros(shape))
    fitted = refit(problem, draft)
    assert slow_error(problem, fitted.dense()) <= before * (1 + 1e-3) + 1e-4 * total
    for part in (fitted.alphabet.left, fitted.alphabet.right, fitted.alphabet.scales, fitted.alphabet.levels):
        assert torch.equal(part, part.half().float())


def test_a_minus_goes_into_the_signs():
    problem, draft = draft_of(3, 12, 3, 4, 0)
    right = draft.alphabet.right * (1 - 2 * (torch.arange(12) % 2))
    # The same problem seen through turned signs: least squares wants the negative of half of v.
    turned = type(draft)(draft.codes, flipped(draft.signs, (right < 0) & (draft.codes == 0)), draft.alphabet)
    found, expected = (fitted_right(problem, start).dense() for start in (turned, draft))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)  # the ridge pulls to either start


def test_what_has_no_entries_keeps_what_it_has():
    problem, draft = draft_of(4, 12, 3, 4, 0)
    codes = draft.codes.clone()
    codes[0, :4] = 0  # no kept entry in a group
    codes[1] = 2  # no background in a row
    codes[:, 7] = 1  # none in a column
    draft = type(draft)(codes, draft.signs, draft.alphabet)
    rows, right = fitted_rows(problem, draft).alphabet, fitted_right(problem, draft).alphabet
    assert rows.scales[0, 0] == draft.alphabet.scales[0, 0]
    assert rows.left[1] == draft.alphabet.left[1]
    assert right.right[7] == pytest.approx(draft.alphabet.right[7].item())
    assert torch.isfinite(rows.scales).all()


@pytest.mark.parametrize("part", ["right", "rows"])
def test_numbers_that_are_off_are_found_again(part):
    """The symbols of a weight that lies on an alphabet are known, its v, or its u and scales, are not."""
    problem, draft = draft_of(12, 24, 3, 6, 0)
    alphabet = draft.alphabet.stored()
    draft = type(draft)(draft.codes, draft.signs, alphabet)
    problem = Problem(draft.dense(), problem.gram)
    generator = torch.Generator().manual_seed(1)

    def off(numbers):
        return numbers * (0.5 + torch.rand(numbers.shape, generator=generator))

    changes = (
        {"right": off(alphabet.right)}
        if part == "right"
        else {"left": off(alphabet.left), "scales": off(alphabet.scales)}
    )
    fitted = start = type(draft)(draft.codes, draft.signs, replace(alphabet, **changes))
    for _ in range(20):
        fitted = refit(problem, fitted)
    # Up to FP16's rounding and the ridge.
    assert slow_error(problem, fitted.dense()) < 1e-4 * slow_error(problem, start.dense())
