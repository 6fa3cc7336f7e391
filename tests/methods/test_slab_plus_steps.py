"""Every step of slab+ on its own objective: a step left out, or done worse, fails here.

All tests share one problem (`wide`): inputs that depend on each other, with norms d that span two orders of magnitude,
enough tokens for feedback to be worth something, and more columns than a block of the sweep has. All is seeded: the
bounds lie between what was measured with a step and without it, and leave room for another machine's rounding.
`tests/mutations.md` says which test stands for which step.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.methods.alphabet_fit import fit_alphabet
from slablm.methods.alphabet_refit import Problem, refit
from slablm.methods.slab_plus import Trial, Way, _plan, descent, feedback, rounded
from slablm.methods.sweep import BLOCK_SIZE, column_sweep, damped
from tests.methods.problems import GROUP, correlated, slow_error, start_of, wide


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_columns_count_by_the_norm_of_their_input(bits):
    """Not all alike, and not by its square: the former is worse by d, the latter where all count alike."""
    weight, gram, _ = wide()
    norms, ones = gram.diagonal().sqrt(), torch.ones(160)
    found = Trial.of(weight, gram, Way(bits, GROUP)).plain().dense()
    alike, squared = (rounded(weight, fit_alphabet(weight, d, bits, GROUP).stored()) for d in (ones, norms.square()))
    # Measured: 0.86 to 0.92, and 0.92 to 0.96.
    assert slow_error(weight, found, norms.diag()) < 0.95 * slow_error(weight, alike, norms.diag())
    assert slow_error(weight, found, ones.diag()) < 0.98 * slow_error(weight, squared, ones.diag())


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("n", [16, 37])
def test_without_correlations_the_sweep_is_rounding(bits, n):
    """Whatever the order of the columns is."""
    weight = torch.randn(5, n, generator=torch.Generator().manual_seed(bits))
    norms = torch.rand(n, generator=torch.Generator().manual_seed(9)) + 0.5
    alphabet = start_of(weight, norms.diag(), bits)
    assert torch.equal(feedback(weight, norms.diag(), alphabet, 0.01).dense(), rounded(weight, alphabet))


@pytest.mark.parametrize("bits", [2, 4])
def test_the_sweep_goes_from_large_inputs_to_small_ones(bits):
    """What the large ones lose, many small ones can make up for, and not the other way round."""
    weight, gram, _ = wide()
    alphabet = start_of(weight, gram, bits)

    def swept(order):
        columns = column_sweep(weight[:, order], gram[order][:, order], _plan(alphabet, order), BLOCK_SIZE, 0.01)
        return columns[:, order.argsort()]

    found = slow_error(weight, feedback(weight, gram, alphabet, 0.01).dense(), gram)
    # Measured: 0.5 to 0.6, and 0.65 to 0.77 of the order they are in.
    assert found < 0.75 * slow_error(weight, swept(gram.diagonal().argsort()), gram)
    assert found < 0.9 * slow_error(weight, swept(torch.arange(160)), gram)


@given(st.integers(1, 4), st.integers(1, 14), st.integers(2, 5), st.integers(0, 100))
def test_descent_gives_every_entry_its_best_value(m, n, bits, seed):
    weight, gram, _ = correlated(m, n, 3 * n + 5, seed)
    gram = damped(gram, 0.05)
    alphabet = start_of(weight, gram, bits, 5)
    problem, start = Problem(weight, gram), feedback(weight, gram, alphabet, 0.05)
    expected = start.dense().double()
    for j in range(n):
        for i in range(m):
            magnitudes = [(alphabet.left[i] * alphabet.right[j]).item()]
            magnitudes += (alphabet.scales[i, j // 5] * alphabet.levels).tolist()
            trials = []
            for value in [sign * size for size in magnitudes for sign in (1, -1)]:
                expected[i, j] = value
                trials.append((slow_error(weight[i : i + 1], expected[i : i + 1], gram), value))
            expected[i, j] = min(trials)[1]
    found = descent(problem, start).dense()
    # Where two values are all but equally good, rounding may choose the other: not a worse one.
    assert slow_error(weight, found, gram) == pytest.approx(slow_error(weight, expected, gram), rel=1e-2)
    assert slow_error(weight, found, gram) <= slow_error(weight, start.dense(), gram) * (1 + 1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_every_step_helps(bits):
    weight, gram, _ = wide()
    alphabet, problem = start_of(weight, gram, bits), Problem(weight, damped(gram, 0.01))
    swept = feedback(weight, gram, alphabet, 0.01)
    fitted = refit(problem, swept)
    drafts = [swept, fitted]
    for _ in range(4):
        drafts.append(refit(problem, descent(problem, drafts[-1])))
    errors = [
        slow_error(weight, step, problem.gram) for step in (rounded(weight, alphabet), *(d.dense() for d in drafts))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.96 * errors[1]
    assert errors[-1] < 0.98 * errors[2]
