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

from slablm.methods.slab_plus import Coder
from slablm.methods.sweep import column_sweep, damped, factored
from slablm.methods.symbols_fit import Problem, fit_alphabet, refit
from slablm.methods.trellis import nearest_codes
from tests.methods.problems import correlated, descended_once, fed, rounded, slow_error, start_of, trial_of, wide


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_columns_count_by_the_norm_of_their_input(bits):
    """Not all alike, and not by its square: the former is worse by d, the latter where all count alike."""
    weight, gram, _ = wide()
    norms, ones = gram.diagonal().sqrt(), torch.ones(160)
    found = trial_of(weight, gram, bits).plain().dense()
    alphabets = (fit_alphabet(weight, d, bits) for d in (ones, norms.square()))
    alike, squared = (alphabet.dense(rounded(weight, alphabet)) for alphabet in alphabets)
    # Measured: 0.90 to 0.96, and 0.95 to 0.98.
    assert slow_error(weight, found, norms.diag()) < 0.98 * slow_error(weight, alike, norms.diag())
    assert slow_error(weight, found, ones.diag()) < 0.99 * slow_error(weight, squared, ones.diag())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("n", [16, 37])
def test_without_correlations_the_sweep_is_rounding(bits, n):
    """Whatever the order of the columns is."""
    weight = torch.randn(5, n, generator=torch.Generator().manual_seed(bits))
    norms = torch.rand(n, generator=torch.Generator().manual_seed(9)) + 0.5
    alphabet = start_of(weight, norms.diag(), bits)
    assert torch.equal(fed(weight, norms.diag(), alphabet, 0.01), rounded(weight, alphabet))


@pytest.mark.parametrize("bits", [2, 4])
def test_the_sweep_goes_from_large_inputs_to_small_ones(bits):
    """What the large ones lose, many small ones can make up for, and not the other way round."""
    weight, gram, _ = wide()
    alphabet = start_of(weight, gram, bits)

    def swept(order):
        columns = column_sweep(weight[:, order], factored(gram[order][:, order], 0.01), Coder(alphabet))
        return columns[:, order.argsort()]

    found = slow_error(weight, alphabet.dense(fed(weight, gram, alphabet, 0.01)), gram)
    # Measured: 0.5 to 0.6, and 0.65 to 0.77 of the order they are in.
    assert found < 0.75 * slow_error(weight, swept(gram.diagonal().argsort()), gram)
    assert found < 0.9 * slow_error(weight, swept(torch.arange(160)), gram)


@given(st.integers(1, 9), st.integers(1, 14), st.integers(2, 5), st.integers(0, 100))
def test_descent_gives_every_column_its_best_symbols(m, n, bits, seed):
    """One column after the other, all others as they are: the target is where the error's slope is 0."""
    weight, gram, _ = correlated(m, n, 3 * n + 5, seed)
    gram = damped(gram, 0.05)
    alphabet = start_of(weight, gram, bits)
    problem, start = Problem(weight, gram), fed(weight, gram, alphabet, 0.05)
    expected = alphabet.dense(start)
    for j in range(n):
        slope = ((weight - expected).double() @ gram[:, j].double()).float()
        _, expected[:, j] = nearest_codes(expected[:, j] + slope / gram[j, j], alphabet.scales, alphabet.values())
    found = alphabet.dense(descended_once(problem, start, alphabet))
    # Where two ways are all but equally good, rounding may choose the other: not a worse one.
    assert slow_error(weight, found, gram) == pytest.approx(slow_error(weight, expected, gram), rel=1e-2)
    assert slow_error(weight, found, gram) <= slow_error(weight, alphabet.dense(start), gram) * (1 + 1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_every_step_helps(bits):
    weight, gram, _ = wide()
    alphabet, problem = start_of(weight, gram, bits), Problem(weight, damped(gram, 0.01))
    steps = [(rounded(weight, alphabet), alphabet)]
    codes = fed(weight, gram, alphabet, 0.01)
    steps += [(codes, alphabet), (codes, refit(problem, codes, alphabet)[0])]
    for _ in range(4):
        codes = descended_once(problem, *steps[-1])
        steps.append((codes, refit(problem, codes, steps[-1][1])[0]))
    errors = [slow_error(weight, alphabet.dense(codes), problem.gram) for codes, alphabet in steps]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.998 * errors[1]
    assert errors[-1] < 0.996 * errors[2]
