import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.errors import SlabError
from slablm.methods.symbols import patterns, signs
from slablm.methods.symbols_fit import (
    Alphabet,
    Problem,
    _fitted_levels,
    fit_alphabet,
    nearest_symbols,
    refit,
    symbol_sums,
)
from slablm.methods.trellis import nearest_codes
from tests.methods.problems import correlated, slow_error

SHAPES = st.tuples(st.integers(1, 10), st.integers(1, 24))


def problem(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator) * torch.rand(m, 1, generator=generator)
    return weight, torch.rand(n, generator=generator).square() * 10 + 0.01


def distortion(weight, alphabet):
    return (weight - alphabet.dense(nearest_symbols(weight, alphabet.scales, alphabet.values()))).square()


@given(SHAPES, st.integers(2, 6), st.integers(0, 1000))
def test_all_columns_at_once_are_each_by_itself(shape, bits, seed):
    weight, _ = problem(*shape, seed)
    scales = weight.abs().amax(dim=1)
    levels = torch.linspace(-0.9, 1, 2**bits)
    codes = nearest_symbols(weight, scales, levels)
    for j in range(shape[1]):
        _, values = nearest_codes(weight[:, j], scales, levels)
        # Where two ways are all but equally near, either may be chosen.
        found = scales * patterns(codes, levels)[:, j]
        torch.testing.assert_close((found - weight[:, j]).norm(), (values - weight[:, j]).norm())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_levels_are_the_least_squares_solution(bits):
    """Moving any of them, either way, only makes it worse."""
    weight, importance = problem(16, 64, bits)
    scales, levels = weight.abs().amax(dim=1), torch.linspace(-0.9, 1, 2**bits)
    codes = nearest_symbols(weight, scales, levels)
    fitted = _fitted_levels(*symbol_sums(weight * signs(codes), importance, codes, 2**bits), scales, levels)

    def error(a):
        return ((weight - scales[:, None] * patterns(codes, a)).square() @ importance).double().sum()

    best = error(fitted)
    assert best < error(levels)
    for index in range(len(levels)):
        for moved in (0.02, -0.02):
            other = fitted.clone()
            other[index] += moved
            assert error(other) >= best


def test_a_level_without_entries_stays():
    weight, importance = problem(8, 8, 0)
    codes, levels = torch.zeros(8, 8, dtype=torch.uint8), torch.linspace(-1, 1, 8)
    fitted = _fitted_levels(*symbol_sums(weight, importance, codes, 8), torch.ones(8), levels)
    kept = sorted(set(levels.tolist()) & set(fitted.tolist()))
    assert kept == levels[1:].tolist()


def test_levels_of_either_parity_are_ascending():
    """Also where one without entries has been passed by another."""
    codes, levels = torch.zeros(8, 8, dtype=torch.uint8), torch.linspace(-1, 1, 8)
    fitted = _fitted_levels(*symbol_sums(torch.ones(8, 8), torch.ones(8), codes, 8), torch.ones(8), levels)
    for parity in (0, 1):
        assert fitted[parity::2].tolist() == sorted(fitted[parity::2].tolist())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounds_come_to_rest_at_the_least_squares_scales(bits):
    """Of errors that count by their column: few columns, so that which of them count makes a difference."""
    weight, importance = problem(64, 24, bits)
    alphabet = fit_alphabet(weight, importance, bits)
    own = patterns(nearest_symbols(weight, alphabet.scales, alphabet.values()), alphabet.values())
    best, alike = (((own * weight) @ h) / (own.square() @ h) for h in (importance, torch.ones(24)))
    off, off_alike = ((alphabet.scales / scales - 1).abs().mean() for scales in (best, alike))
    # Measured: 0.004 to 0.3.
    assert off < 0.5 * off_alike


@pytest.mark.parametrize(("bits", "lloyd"), [(2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)])
def test_normal_weights_get_less_than_the_distortion_of_lloyd_and_max(bits, lloyd):
    """Max (1960), table I, is the best that 2ᵖ levels can do for a normal density without a trellis."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    found = distortion(weight, fit_alphabet(weight, torch.ones(1024), bits)).mean().item()
    # Measured: 0.89, 0.81, 0.78, 0.76. No code of this rate is below 4⁻ᵖ (Shannon).
    assert 4.0**-bits < found < (0.91 if bits == 2 else 0.83) * lloyd


def test_important_columns_are_fitted_better():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight[:, :8] = weight[:, :8].sign() * (2 + weight[:, :8].abs())  # where the others are not
    importance = torch.ones(64)
    importance[:8] = 1000

    def lost(d):
        return distortion(weight, fit_alphabet(weight, d, 3))[:, :8].mean()

    assert lost(importance) < 0.75 * lost(torch.ones(64))


@pytest.mark.parametrize("scale", [2.0**-40, 1.0, 2.0**60])
def test_importance_counts_up_to_a_factor(scale):
    weight, importance = problem(6, 20, 0)
    expected, found = (fit_alphabet(weight, d, 3) for d in (importance, importance * scale))
    assert torch.equal(found.levels, expected.levels)
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("bits", [2, 5])
def test_rows_of_zeros(bits):
    weight, importance = problem(6, 12, 0)
    weight[1] = 0
    assert torch.equal(distortion(weight, fit_alphabet(weight, importance, bits))[1], torch.zeros(12))
    zero = torch.zeros(3, 5)
    assert torch.equal(distortion(zero, fit_alphabet(zero, torch.ones(5), bits)), zero)


# With all symbols fixed


def start(m, n, bits, seed):
    weight, gram, _ = correlated(m, n, 3 * n + 5, seed)
    gram.diagonal().add_(0.05 * gram.diagonal().mean())
    alphabet = fit_alphabet(weight, gram.diagonal(), bits)
    return Problem(weight, gram), nearest_symbols(weight, alphabet.scales, alphabet.values()), alphabet


@given(SHAPES, st.integers(2, 6), st.integers(0, 1000))
def test_scales_are_the_least_squares_solution(shape, bits, seed):
    given_problem, codes, alphabet = start(*shape, bits, seed)
    fitted, residual = refit(given_problem, codes, alphabet)
    expected = (given_problem.weight - fitted.dense(codes)) @ given_problem.gram
    torch.testing.assert_close(residual, expected, rtol=1e-4, atol=1e-4 * given_problem.pull.abs().max().item())
    assert torch.equal(fitted.levels, alphabet.levels)
    assert torch.equal(fitted.scales, fitted.scales.half().float())
    best = slow_error(given_problem.weight, fitted.dense(codes), given_problem.gram)
    assert best <= slow_error(given_problem.weight, alphabet.dense(codes), given_problem.gram) * (1 + 1e-3)
    for factor in (0.97, 1.03):
        moved = Alphabet(fitted.scales * factor, fitted.levels)
        assert slow_error(given_problem.weight, moved.dense(codes), given_problem.gram) >= best * (1 - 1e-4)


def test_a_row_that_is_better_at_zero_is_zero():
    given_problem, codes, alphabet = start(8, 16, 3, 0)
    turned = Problem(-alphabet.dense(codes), given_problem.gram)
    assert torch.equal(refit(turned, codes, alphabet)[0].scales, torch.zeros(8))


def test_scales_that_are_off_are_found_again():
    given_problem, codes, alphabet = start(8, 16, 4, 0)
    off = Alphabet(alphabet.scales * (0.5 + torch.rand(8, generator=torch.Generator().manual_seed(0))), alphabet.levels)
    exact = Problem(alphabet.dense(codes), given_problem.gram)
    torch.testing.assert_close(refit(exact, codes, off)[0].scales, alphabet.scales, rtol=2**-10, atol=0)


@pytest.mark.parametrize("bad", [1e38, float("inf"), float("nan")])
def test_what_does_not_fit_into_fp16_is_refused(bad):
    weight, importance = problem(6, 12, 0)
    weight[2, 3] = bad
    with pytest.raises(SlabError, match="does not fit into FP16.*ignore this layer"):
        fit_alphabet(weight, importance, 3)
