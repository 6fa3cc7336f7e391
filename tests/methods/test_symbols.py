from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods import LayerStats, get_method
from slablm.methods.rotation import Rotation
from slablm.methods.slab_plus import damped
from slablm.methods.symbols import DAMPINGS, DESCENTS, descent, feedback, rounded, symbols
from slablm.methods.symbols_fit import fit_alphabet
from slablm.methods.symbols_refit import Problem, refit
from tests.methods.problems import correlated, stats_of


def slow_error(weight, approximation, gram):
    difference = (weight - approximation).double()
    return ((difference @ gram.double()) * difference).sum().item()


def start_of(weight, gram, bits, group_size=16):
    return fit_alphabet(weight, gram.diagonal().sqrt(), bits, group_size).stored()


def fed(weight, gram, alphabet, damping, descents=DESCENTS):
    """Steps 2, 3 and 5, one after the other."""
    problem = Problem(weight, damped(gram, damping))
    draft = refit(problem, feedback(weight, gram, alphabet, damping))
    for _ in range(descents):
        draft = refit(problem, descent(problem, draft))
    return draft


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("n", [16, 37])
def test_without_correlations_the_sweep_is_rounding(bits, n):
    weight = torch.randn(5, n, generator=torch.Generator().manual_seed(bits))
    norms = torch.rand(n, generator=torch.Generator().manual_seed(9)) + 0.5
    alphabet = start_of(weight, norms.diag(), bits)
    assert torch.equal(feedback(weight, norms.diag(), alphabet, 0.01).dense(), rounded(weight, alphabet))


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
    weight, gram, _ = correlated()
    alphabet, trusted = start_of(weight, gram, bits), damped(gram, 0.01)
    swept = feedback(weight, gram, alphabet, 0.01)
    fitted = refit(Problem(weight, trusted), swept)
    descended = descent(Problem(weight, trusted), fitted)
    whole = fed(weight, gram, alphabet, 0.01)
    dense = [rounded(weight, alphabet), *(draft.dense() for draft in (swept, fitted, descended, whole))]
    errors = [slow_error(weight, step, trusted) for step in dense]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.8 * errors[0]
    assert errors[4] < 0.97 * errors[2]


@pytest.mark.parametrize("rotation", [None, Rotation(40, 8, 3)])
@pytest.mark.parametrize("bits", [2, 4])
def test_held_out_tokens_choose_the_damping_and_whether_there_is_feedback(rotation, bits):
    for seed in range(4):
        weight, gram, held_out = correlated(seed=seed, tokens=45)  # few tokens: feedback overfits
        result = symbols(weight, stats_of(gram, held_out), bits, 16, (rotation,))
        rows, theirs, judges = weight, gram, held_out
        if rotation is not None:
            rows, theirs, judges = rotation.rotate(weight), rotation.rotate_gram(gram), rotation.rotate_gram(held_out)
        alphabet = start_of(rows, theirs, bits)
        errors = {d: slow_error(rows, fed(rows, theirs, alphabet, d, 0).dense(), judges) for d in DAMPINGS}
        best = fed(rows, theirs, alphabet, min(errors, key=errors.get)).dense()
        finals = [slow_error(rows, final, judges) for final in (best, rounded(rows, alphabet))]
        assert slow_error(weight, result.dense(), held_out) == pytest.approx(min(finals), rel=1e-4)
        assert result.symbol_bits == bits
        assert result.rotation == rotation


def test_feedback_never_does_harm_on_held_out_tokens():
    """Inputs that have nothing to do with those held back: what was fitted to the former is worth nothing."""
    weight, gram, _ = correlated(tokens=60)
    _, other, _ = correlated(tokens=60, seed=7)
    held_out = torch.eye(40) + 1e-3 * other / other.diagonal().mean()
    result = symbols(weight, stats_of(gram, held_out), 3, 16)
    assert torch.equal(result.dense(), rounded(weight, start_of(weight, gram, 3)))


def test_rotation_is_chosen_where_it_helps_and_not_where_it_does_not():
    generator = torch.Generator().manual_seed(0)
    rotation = Rotation(64, 64, 1)
    inputs = torch.randn(2, 300, 64, generator=generator)
    # Few large weights in every row: rotated they are all alike, as two levels can have it. Two magnitudes as they are.
    peaked = torch.randn(32, 64, generator=generator) * (torch.rand(32, 64, generator=generator) ** 8)
    two_valued = torch.where(torch.rand(32, 64, generator=generator) < 0.5, 1.0, -3.0)
    for weight, wanted in ((peaked, rotation), (two_valued, None)):
        stats = stats_of(*(x.T @ x for x in inputs))
        assert symbols(weight, stats, 2, 64, (None, rotation)).rotation == wanted
        assert symbols(weight, stats, 2, 64, (rotation, None)).rotation == wanted


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (130, 7), (5, 128), (4, 200)])
def test_any_shape_and_the_same_bits_every_time(bits, shape):
    weight, gram, held_out = correlated(*shape, tokens=2 * shape[1] + 5)
    first, second = (symbols(weight, stats_of(gram, held_out), bits) for _ in range(2))
    assert torch.equal(first.dense(), second.dense())
    assert torch.equal(first.symbols(), second.symbols())
    assert first.shape == shape
    assert torch.isfinite(first.dense()).all()


def test_a_long_row_is_rotated_in_blocks():
    weight, gram, held_out = correlated(6, 96)
    result = symbols(weight, stats_of(gram, held_out), 4, 128, (Rotation(96, 32, 0),))
    assert slow_error(weight, result.dense(), held_out) < 0.02 * slow_error(weight, torch.zeros(6, 96), held_out)


def test_more_bits_are_better():
    weight, gram, held_out = correlated(48, 64)
    errors = [slow_error(weight, symbols(weight, stats_of(gram, held_out), p).dense(), held_out) for p in (2, 3, 4, 5)]
    assert all(more < 0.5 * fewer for fewer, more in pairwise(errors))


@pytest.mark.parametrize("rotation", [None, Rotation(40, 8, 0)])
def test_dead_inputs_and_rows_of_zeros(rotation):
    weight, gram, held_out = correlated()
    for matrix in (gram, held_out):
        matrix[:, 5], matrix[5] = 0, 0
    weight[3] = 0
    result = symbols(weight, stats_of(gram, held_out), 4, 16, (rotation,))
    assert torch.equal(result.dense()[3], torch.zeros(40))
    assert slow_error(weight, result.dense(), held_out) < 0.02 * slow_error(weight, torch.zeros(24, 40), held_out)


@pytest.mark.parametrize("held_out", [None, torch.zeros(12, 12), torch.eye(12)])
def test_no_inputs_and_no_weights(held_out):
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    result = symbols(weight, stats_of(torch.zeros(12, 12), held_out), 4)
    torch.testing.assert_close(result.dense(), weight, rtol=0, atol=0.5)
    zero = symbols(torch.zeros(4, 12), stats_of(torch.eye(12), held_out), 3)
    assert torch.equal(zero.dense(), torch.zeros(4, 12))


def test_without_held_out_tokens_the_first_damping_counts():
    weight, gram, _ = correlated()
    alphabet = start_of(weight, gram, 4)
    assert torch.equal(symbols(weight, stats_of(gram), 4, 16).dense(), fed(weight, gram, alphabet, DAMPINGS[0]).dense())


def test_the_callers_tensors_survive():
    weight, gram, held_out = correlated()
    before = [tensor.clone() for tensor in (weight, gram, held_out)]
    symbols(weight, stats_of(gram, held_out), 3, 16, (None, Rotation(40, 8, 0)))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((weight, gram, held_out), before, strict=True))


def test_half_precision_weights_are_computed_in_float32():
    weight, gram, held_out = correlated()
    half = weight.half()
    found, expected = (symbols(w, stats_of(gram, held_out), 4).dense() for w in (half, half.float()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [1e-5, 1e4])
def test_small_and_large_weights_are_done_as_well(scale):
    weight, gram, held_out = correlated()
    result = symbols(weight * scale, stats_of(gram, held_out), 4, 16)
    plain = symbols(weight, stats_of(gram, held_out), 4, 16)
    assert slow_error(weight, result.dense() / scale, held_out) < 1.1 * slow_error(weight, plain.dense(), held_out)


@pytest.mark.parametrize("bits", [1, 6])
def test_bits_out_of_range_are_refused(bits):
    weight, gram, _ = correlated(2, 4)
    with pytest.raises(SlabError, match=f"2 to 5 bits, not {bits}"):
        symbols(weight, stats_of(gram), bits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    weight, gram, _ = correlated(2, 4)
    broken = weight.clone()
    broken[1, 2] = bad
    with pytest.raises(SlabError, match="a weight holds infinity or NaN.*ignore this layer"):
        symbols(broken, stats_of(gram), 4)
    gram[1, 1] = bad
    with pytest.raises(SlabError, match="Gram matrix.*infinity or NaN"):
        symbols(weight, stats_of(gram), 4)


def test_a_weight_too_large_for_fp16_is_refused():
    weight, gram, _ = correlated(2, 4)
    with pytest.raises(SlabError, match="FP16"):
        symbols(weight * 1e15, stats_of(gram), 4)


def test_gram_is_needed():
    with pytest.raises(SlabError, match="'symbols' needs the Gram matrix"):
        symbols(torch.ones(2, 4), LayerStats(torch.ones(4), 1, torch.zeros(0, 4)), 4)


def test_as_methods_they_take_bits_groups_and_seed_from_the_settings():
    weight, *grams = correlated(12, 64)
    stats = stats_of(*grams)
    config = CompressionConfig(method="symbols", value_bits=3, group_size=32, seed=5)
    plain, rotated = (get_method(name).function(weight, stats, config) for name in ("symbols", "symbols-rotated"))
    assert plain.symbol_bits == rotated.symbol_bits == 3
    assert plain.rotation is None
    assert rotated.rotation == Rotation(64, 64, 5)
    assert get_method("symbols-rotated").function(weight, stats, replace(config, seed=-1)).rotation.seed == 2**64 - 1
    with pytest.raises(SlabError, match="symbols have 2 to 5 bits, not 8"):
        get_method("symbols").function(weight, stats, replace(config, value_bits=8))
