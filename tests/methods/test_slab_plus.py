"""slab+ as a whole: what held-out tokens decide, settings, and what is refused."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods import LayerStats, SymbolBudget, get_method, quantizers, storage
from slablm.methods import slab_plus as slab_plus_module
from slablm.methods.rotation import Rotation
from slablm.methods.slab_plus import DAMPINGS, slab_plus
from slablm.methods.sweep import damped, factored
from slablm.methods.trials import SAMPLED_ROWS, trial_rows
from tests.methods.problems import (
    by_hand,
    correlated,
    decomposed,
    rounded,
    settings_for,
    slow_error,
    start_of,
    stats_of,
    trial_of,
    wide,
)

# What held-out tokens decide


def judges():
    """Gram matrices of held-out tokens: of the same inputs, of those that feedback has forgotten, and in between."""
    _, gram, same = wide()
    forgotten = damped(gram, 1e-3).inverse()
    return {
        "same": same,
        "forgotten": forgotten,
        "between": same + 0.1 * forgotten * (same.trace() / forgotten.trace()),
    }


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("inputs", ["same", "forgotten", "between"])
def test_the_best_trial_is_the_result(inputs, bits):
    """All rows are in the sample, so what is best of all that is tried is known."""
    weight, gram, _ = wide()
    held_out = judges()[inputs]
    rotated = Rotation(160, 32, 7)
    ways = [(rotation, damping) for rotation in (None, rotated) for damping in DAMPINGS]
    tried = {way: slow_error(weight, by_hand(weight, gram, bits, *way, descents=0), held_out) for way in ways}
    rotation, damping = min(tried, key=tried.get)
    if (inputs, bits) != ("same", 2):  # there both dampings are as good; elsewhere the second best is 14 % worse
        expected = {"same": (rotated, 0.01), "forgotten": (None, 0.1), "between": (rotated, 0.1)}
        assert (rotation, damping) == expected[inputs]
    whole = slow_error(weight, by_hand(weight, gram, bits, rotation, damping), held_out)
    plain = slow_error(weight, trial_of(weight, gram, bits, rotation).plain().dense(), held_out)
    assert (plain < whole) == (inputs == "forgotten")
    result = decomposed(weight, stats_of(gram, held_out), bits, seed=7)
    assert result.rotation == rotation
    assert slow_error(weight, result.dense(), held_out) == pytest.approx(min(whole, plain), rel=1e-3)


@pytest.mark.parametrize("method", ["slab+", "gptq"])
def test_layers_that_share_statistics_share_what_is_made_of_them(method, monkeypatch):
    """Each factor is made once, and nothing else comes of it."""
    weight, gram, held_out = wide()
    weights, made = weight.split([20, 4, 24]), []
    for module in (slab_plus_module, quantizers):
        monkeypatch.setattr(module, "factored", lambda *arguments: made.append(arguments) or factored(*arguments))
    alone, shared = stats_of(gram, held_out), replace(stats_of(gram, held_out), kept={})

    def results(stats):
        settings = CompressionConfig(method, group_size=32) if method == "gptq" else None
        made.clear()
        found = [
            get_method(method).function(w, stats, settings or settings_for(w.shape, 3, seed=7)).dense() for w in weights
        ]
        return found, len(made)

    expected, each = results(alone)
    found, once = results(shared)
    ways = 2 if method == "gptq" else 4
    assert (each, once) == (3 * (ways + 1), ways)
    assert len(shared.kept) == get_method(method).kept_matrices
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("bits", [2, 4])
def test_dampings_are_judged_on_held_out_tokens(bits):
    """From few tokens, to which feedback overfits, and from many: which damping is best differs."""
    chosen = set()
    for seed in range(6):
        weight, gram, held_out = correlated(n=41, seed=seed, tokens=(46, 4000)[seed % 2])  # 41: no rotation
        errors = {d: slow_error(weight, by_hand(weight, gram, bits, None, d, descents=0), held_out) for d in DAMPINGS}
        damping = min(errors, key=errors.get)
        alphabet = start_of(weight, gram, bits)
        finals = by_hand(weight, gram, bits, None, damping), alphabet.dense(rounded(weight, alphabet))
        result = decomposed(weight, stats_of(gram, held_out), bits)
        least = min(slow_error(weight, final, held_out) for final in finals)
        assert slow_error(weight, result.dense(), held_out) == pytest.approx(least, rel=1e-3)
        chosen.add(damping)
    assert chosen == set(DAMPINGS)


def test_feedback_never_does_harm_on_held_out_tokens():
    """Inputs that have nothing to do with those held back: what was fitted to the former is worth nothing."""
    weight, gram, _ = correlated(n=41, tokens=60)
    _, other, _ = correlated(n=41, tokens=60, seed=7)
    held_out = torch.eye(41) + 1e-3 * other / other.diagonal().mean()
    result = decomposed(weight, stats_of(gram, held_out), 3)
    alphabet = start_of(weight, gram, 3)
    assert torch.equal(result.dense(), alphabet.dense(rounded(weight, alphabet)))


def peaked_and_two_valued(m):
    """Weights that want a rotation of their 64 inputs, and weights that do not, for symbols of 2 bits.

    Few large columns: rotated they are all alike, as four levels can have it. Two values as they are.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 300, 64, generator=generator)
    peaked = torch.randn(m, 64, generator=generator) * torch.rand(64, generator=generator) ** 8
    two_valued = torch.where(torch.rand(m, 64, generator=generator) < 0.5, 1.0, -3.0)
    return peaked, two_valued, stats_of(*(x.T @ x for x in inputs))


def test_rotation_is_chosen_where_it_helps_and_not_where_it_does_not():
    peaked, two_valued, stats = peaked_and_two_valued(32)
    assert decomposed(peaked, stats, 2, seed=1).rotation == Rotation(64, 64, 1)
    assert decomposed(two_valued, stats, 2, seed=1).rotation is None


@pytest.mark.parametrize("seed", [0, 5])
def test_the_rows_that_are_tried_decide(seed):
    peaked, two_valued, stats = peaked_and_two_valued(4 * SAMPLED_ROWS)
    tried = torch.zeros(len(peaked), 1, dtype=torch.bool)
    tried[trial_rows(len(peaked), seed)] = True
    weights = peaked.where(tried, two_valued), two_valued.where(tried, peaked)
    results = [decomposed(weight, stats, 2, seed) for weight in weights]
    assert [result.rotation for result in results] == [Rotation(64, 64, seed), None]
    assert all(result.shape == peaked.shape for result in results)


def test_without_held_out_tokens_nothing_is_chosen():
    weight, gram, _ = wide()
    result = decomposed(weight, stats_of(gram), 4)
    assert result.rotation is None
    assert torch.equal(result.dense(), by_hand(weight, gram, 4, damping=DAMPINGS[0]))


@pytest.mark.parametrize(
    ("without", "factor"),
    [({"sweep": False}, 0.87), ({"fit": False}, 0.995), ({"descents": 0}, 0.95)],  # measured: 0.75, 0.990, 0.90
)
def test_no_step_can_be_left_out(without, factor):
    """On held-out tokens, against the same steps by hand without one of them."""
    weight, gram, held_out = wide()
    result = decomposed(weight, stats_of(gram, held_out), 3)
    way = result.rotation, 0.01
    found = slow_error(weight, result.dense(), held_out)
    assert found == pytest.approx(slow_error(weight, by_hand(weight, gram, 3, *way), held_out), rel=1e-3)
    assert found < factor * slow_error(weight, by_hand(weight, gram, 3, *way, **without), held_out)


# All of it


def test_clearly_better_than_slab_of_more_bits():
    weight, gram, held_out = wide()
    plus = decomposed(weight, stats_of(gram, held_out), 4)
    slab = get_method("slab").function(weight, stats_of(gram), CompressionConfig("slab"))
    assert plus.true_bits() < 0.7 * slab.bits()  # in which positions are not even counted
    # Measured: 0.62.
    assert slow_error(weight, plus.dense(), held_out) < 0.75 * slow_error(weight, slab.dense(), held_out)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (130, 7), (5, 128), (4, 200)])
def test_any_shape_and_the_same_bits_every_time(bits, shape):
    weight, gram, held_out = correlated(*shape, tokens=2 * shape[1] + 5)
    first, second = (decomposed(weight, stats_of(gram, held_out), bits) for _ in range(2))
    assert first.symbol_bits == bits
    assert first.shape == shape
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.dense(), second.dense())
    assert torch.isfinite(first.dense()).all()


def test_a_long_row_is_rotated_in_blocks():
    weight, gram, held_out = correlated(6, 96)
    rotation = Rotation(96, 32, 0)
    result = trial_of(weight, gram, 4, rotation).descended()
    assert result.rotation == rotation
    assert slow_error(weight, result.dense(), held_out) < 0.02 * slow_error(weight, torch.zeros(6, 96), held_out)


def test_more_bits_are_better():
    weight, gram, held_out = correlated(48, 64)
    results = [decomposed(weight, stats_of(gram, held_out), bits).dense() for bits in (2, 3, 4, 5, 6)]
    errors = [slow_error(weight, dense, held_out) for dense in results]
    assert all(more < 0.5 * fewer for fewer, more in pairwise(errors))


@pytest.mark.parametrize("rotation", [None, Rotation(40, 8, 0)])
def test_dead_inputs_and_rows_of_zeros(rotation):
    weight, gram, held_out = correlated()
    for matrix in (gram, held_out):
        matrix[:, 5], matrix[5] = 0, 0
    weight[3] = 0
    zero = slow_error(weight, torch.zeros(24, 40), held_out)
    trial = trial_of(weight, gram, 4, rotation)
    for result in (trial.descended(), decomposed(weight, stats_of(gram, held_out), 4)):
        assert torch.equal(result.dense()[3], torch.zeros(40))
        assert slow_error(weight, result.dense(), held_out) < 0.02 * zero


@pytest.mark.parametrize("held_out", [None, torch.zeros(12, 12), torch.eye(12)])
def test_no_inputs_and_no_weights(held_out):
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    result = decomposed(weight, stats_of(torch.zeros(12, 12), held_out), 4)
    torch.testing.assert_close(result.dense(), weight, rtol=0, atol=0.5)
    zero = decomposed(torch.zeros(4, 12), stats_of(torch.eye(12), held_out), 3)
    assert torch.equal(zero.dense(), torch.zeros(4, 12))


def test_the_callers_tensors_survive():
    weight, gram, held_out = correlated()
    before = [tensor.clone() for tensor in (weight, gram, held_out)]
    decomposed(weight, stats_of(gram, held_out), 3)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((weight, gram, held_out), before, strict=True))


def test_half_precision_weights_are_computed_in_float32():
    weight, gram, held_out = correlated()
    half = weight.half()
    found, expected = (decomposed(w, stats_of(gram, held_out), 4).dense() for w in (half, half.float()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [1e-5, 1e4])
def test_small_and_large_weights_are_done_as_well(scale):
    weight, gram, held_out = correlated()
    found, plain = (decomposed(w, stats_of(gram, held_out), 4).dense() for w in (weight * scale, weight))
    assert slow_error(weight, found / scale, held_out) < 1.1 * slow_error(weight, plain, held_out)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_number_of_tokens_does_not_matter(scale):
    """Dampings are relative."""
    weight, gram, held_out = correlated()
    found, plain = (decomposed(weight, stats_of(gram * s, held_out), 4).dense() for s in (scale, 1))
    assert slow_error(weight, found, held_out) < 1.1 * slow_error(weight, plain, held_out)


# Settings, and what is refused


@given(st.integers(1, 9), st.integers(1, 40), st.floats(2.01, 9))
def test_symbols_have_the_most_bits_that_the_budget_allows(tiles, columns, budget):
    """What the method does is what `storage` tells others that it will do."""
    shape = 4 * tiles, 4 * columns
    config = CompressionConfig(bits_per_weight=budget)
    weight, gram, _ = correlated(*shape, tokens=20)
    try:
        expected = storage(shape, config)
    except SlabError as error:
        with pytest.raises(SlabError, match=str(error)):
            slab_plus(weight, stats_of(gram), config)
        return
    assert isinstance(expected, SymbolBudget)
    result = slab_plus(weight, stats_of(gram), config)
    assert SymbolBudget(result.symbol_bits) == expected
    assert result.true_bits() <= budget * weight.numel()


def test_the_seed_is_that_of_the_rotation():
    peaked, _, stats = peaked_and_two_valued(32)
    config = settings_for(peaked.shape, 2)
    seeds = [slab_plus(peaked, stats, replace(config, seed=seed)).rotation.seed for seed in (0, 3, -1, 2**62 - 1)]
    assert seeds == [0, 3, 2**64 - 1, 2**62 - 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    weight, gram, _ = correlated(2, 4)
    broken = weight.clone()
    broken[1, 2] = bad
    with pytest.raises(SlabError, match="a weight holds infinity or NaN.*ignore this layer"):
        decomposed(broken, stats_of(gram), 4)
    gram[1, 1] = bad
    with pytest.raises(SlabError, match="Gram matrix.*infinity or NaN"):
        decomposed(weight, stats_of(gram), 4)


@pytest.mark.parametrize("held_out", [None, torch.eye(4)])
def test_a_weight_too_large_for_fp16_is_refused(held_out):
    weight, gram, _ = correlated(2, 4)
    with pytest.raises(SlabError, match="does not fit into FP16.*ignore this layer"):
        decomposed(weight * 1e15, stats_of(gram, held_out), 4)


def test_gram_is_needed():
    with pytest.raises(SlabError, match=r"method 'slab\+' needs the Gram matrix"):
        decomposed(torch.ones(2, 4), LayerStats(torch.ones(4), 1, torch.zeros(0, 4)), 4)


def test_a_budget_that_is_too_small_is_refused():
    weight, gram, _ = correlated(4, 32)
    with pytest.raises(SlabError, match="3 bits per weight are too few for a weight with shape 4x32"):
        slab_plus(weight, stats_of(gram), CompressionConfig(bits_per_weight=3))
