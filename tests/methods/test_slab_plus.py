from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm import SlabError
from slablm.config import CompressionConfig
from slablm.methods import LayerStats, get_method
from slablm.methods.budget import coded_bytes, kept_per_row
from slablm.methods.slab_plus import (
    SAMPLED_ROWS,
    Form,
    closed_form,
    damped,
    descent,
    fed,
    feedback,
    output_error,
    possible_forms,
    refit,
    slab_plus,
    trial_rows,
)
from tests.methods.problems import correlated, stats_of


def slow_error(weight, approximation, gram):
    """Σ over rows of e G eᵀ, entry by entry."""
    difference = (weight - approximation).double()
    return sum((row[:, None] * gram.double() * row[None]).sum().item() for row in difference)


@pytest.mark.parametrize("settings", [{"ratio": 0.5}, {"ratio": 0.7}, {"ratio": 0.5, "magnitude_bits": 3}])
def test_never_worse_than_the_closed_form_on_held_out_tokens(settings):
    config = CompressionConfig(method="slab+", group_size=16, **settings)
    for seed in range(5):
        weight, gram, held_out = correlated(seed=seed, tokens=45)  # few tokens: feedback overfits
        result = slab_plus(weight, stats_of(gram, held_out), config)
        (form,) = possible_forms((24, 40), config)
        plain = closed_form(weight, gram, config, form)
        assert slow_error(weight, result.dense(), held_out) <= slow_error(weight, plain.dense(), held_out) * (1 + 1e-5)
        assert result.kept == kept_per_row((24, 40), config, rank=1, signs=True)


def test_clearly_better_than_slab_where_inputs_depend_on_each_other():
    weight, gram, held_out = correlated()
    plus = slab_plus(weight, stats_of(gram, held_out), CompressionConfig(method="slab+"))
    slab = get_method("slab").function(weight, stats_of(gram), CompressionConfig())
    assert plus.kept == slab.kept
    assert slow_error(weight, plus.dense(), held_out) < 0.7 * slow_error(weight, slab.dense(), held_out)


@pytest.mark.parametrize("m", [1, 63, 64, 65, 127, 4096])
def test_trials_look_at_random_rows(m):
    rows = trial_rows(m, seed=0)
    assert len(rows) == min(m, SAMPLED_ROWS)
    assert (rows.diff() > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < m
    assert torch.equal(rows, trial_rows(m, seed=0))
    assert (m <= SAMPLED_ROWS) == torch.equal(rows, trial_rows(m, seed=1))


def test_trials_do_not_alias_with_attention_heads(monkeypatch):
    """A stride over the rows of a q_proj found one pair of the rotary embedding in every head."""
    seen = []

    def spy(sample, gram, held_out, config, forms):
        seen.append(sample[:, 0].long())
        return forms[0], 0.1

    # By its name: in the package the function hides the module.
    monkeypatch.setattr(import_module("slablm.methods.slab_plus"), "_best_trial", spy)
    _, gram, held_out = correlated(n=12, tokens=40)
    weight = torch.arange(4096.0)[:, None].expand(-1, 12)
    for seed in (3, 3, 4):
        slab_plus(weight, stats_of(gram, held_out), CompressionConfig(ratio=0.5, iterations=1, seed=seed))
    for head_size in (32, 64, 128):
        assert len((seen[0] % head_size).unique()) > head_size / 4
    assert torch.equal(seen[0], trial_rows(4096, seed=3))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_without_held_out_tokens_there_is_no_feedback():
    weight, gram, _ = correlated()
    config = CompressionConfig(method="slab+", magnitude_bits=4, group_size=8)
    result = slab_plus(weight, stats_of(gram), config)
    plain = closed_form(weight, gram, config, *possible_forms((24, 40), config))
    assert torch.equal(result.dense(), plain.dense())


@given(st.integers(2, 20), st.integers(12, 40), st.integers(1, 7), st.floats(2.5, 8.5), st.integers(0, 100))
def test_a_budget_in_true_bits_is_kept(m, n, group_size, per_weight, seed):
    config = CompressionConfig(method="slab+", bits_per_weight=per_weight, group_size=8 * group_size, iterations=2)
    weight, gram, held_out = correlated(m, n, 60, seed)
    if 8 * coded_bytes((m, n), 1, 1, config.group_size) > per_weight * m * n:
        with pytest.raises(SlabError, match="keep no entry"):
            slab_plus(weight, stats_of(gram, held_out), config)
        return
    result = slab_plus(weight, stats_of(gram, held_out), config)
    assert 8 * coded_bytes((m, n), result.kept, result.grid.bits, config.group_size) <= per_weight * m * n
    columns = result.mask.nonzero()[:, 1].view(m, result.kept)
    assert torch.allclose(result.grid.nearest(result.values.abs(), columns), result.values.abs())
    assert torch.equal(result.signs[result.mask].view(m, -1), result.values < 0)


@pytest.mark.parametrize("bits", [None, 2])
def test_rows_keep_as_many_entries_as_the_form_says(bits):
    weight, gram, _ = correlated()
    start = closed_form(weight, gram, CompressionConfig(method="slab+", group_size=16), Form(13, bits))
    result = fed(weight, gram, start, 0.01, choose=True)
    assert (result.mask.sum(dim=1) == 13).all()
    assert torch.equal(result.dense()[result.mask].view(24, 13), result.values)


def test_a_pattern_binds_the_positions():
    weight, gram, held_out = correlated()
    result = slab_plus(weight, stats_of(gram, held_out), CompressionConfig(method="slab+", pattern="2:4", ratio=0.4))
    assert (result.mask.view(24, 10, 4).sum(dim=2) <= 2).all()


def test_refit_is_the_least_squares_solution():
    weight, gram, _ = correlated()
    gram = damped(gram, 0.01)
    config = CompressionConfig(method="slab+")
    start = closed_form(weight, gram, config, Form(12, None))
    result = refit(weight, start, gram)
    assert torch.equal(result.mask, start.mask)
    assert torch.equal(result.values, start.values)
    least = slow_error(weight, result.dense(), gram)
    assert least < slow_error(weight, start.dense(), gram)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):  # no u does better for this v
        nudged = result.left + 0.01 * result.left.abs().mean() * torch.randn(24, 1, generator=generator)
        other = type(result)(result.mask, result.values, nudged, result.right, result.signs)
        assert slow_error(weight, other.dense(), gram) > least


@pytest.mark.parametrize("bits", [None, 3])
def test_descent_lowers_the_error_of_the_sweep(bits):
    weight, gram, _ = correlated()
    trusted = damped(gram, 0.01)
    start = closed_form(weight, gram, CompressionConfig(method="slab+", group_size=16), Form(13, bits))
    swept = refit(weight, feedback(weight, gram, start, 0.01, choose=False), trusted)
    lower = descent(weight, trusted, swept, choose=False)
    assert torch.equal(lower.mask, start.mask)
    assert slow_error(weight, lower.dense(), trusted) < 0.98 * slow_error(weight, swept.dense(), trusted)
    assert (swept.left >= 0).all()
    assert (swept.right >= 0).all()


def test_output_error_is_the_quadratic_form():
    weight, gram, _ = correlated()
    approximation = closed_form(weight, gram, CompressionConfig(method="slab+"), Form(12, 3))
    assert output_error(weight, approximation, gram) == pytest.approx(
        slow_error(weight, approximation.dense(), gram), rel=1e-4
    )


def test_dead_inputs_do_no_harm():
    weight, gram, held_out = correlated()
    for matrix in (gram, held_out):
        matrix[5], matrix[:, 5] = 0, 0
    result = slab_plus(weight, stats_of(gram, held_out), CompressionConfig(method="slab+", bits_per_weight=5.0))
    assert torch.isfinite(result.dense()).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "slab", "bits_per_weight": 4.0}, "bits_per_weight needs method 'slab\\+'"),
        ({"method": "slab", "magnitude_bits": 4}, "magnitude_bits needs method 'slab\\+'"),
        ({"method": "slab+", "rank": 2}, "has rank 1"),
        ({"method": "slab+", "magnitude_bits": 8}, "magnitude_bits must lie between 1 and 7"),
        ({"method": "slab+", "bits_per_weight": 1.0}, "must lie above 1 and not above 9"),
        ({"method": "slab+", "bits_per_weight": 4.0, "pattern": "2:4"}, "with pattern 2:4 use a ratio"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SlabError, match=message):
        CompressionConfig(**settings)


def test_a_missing_gram_matrix_is_named():
    weight, gram, _ = correlated()
    stats = LayerStats(gram.diagonal().sqrt(), 400, torch.zeros(0, 40))
    with pytest.raises(SlabError, match="needs the Gram matrix"):
        slab_plus(weight, stats, CompressionConfig(method="slab+"))
