"""SparseGPT against Optimal Brain Surgeon written out: the inverse Hessian shrinks by one row and column per step."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slablm.config import CompressionConfig, Pattern
from slablm.errors import SlabError
from slablm.methods import LayerStats
from slablm.methods.results import PrunedWeight
from slablm.methods.sparsegpt import sparsegpt

TOLERANCE = 1e-3  # float32 against float64


def problem(m, n, seed, dead=False):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * n + 5, n, generator=generator)
    inputs += 0.5 * torch.randn(len(inputs), 3, generator=generator) @ torch.randn(3, n, generator=generator)
    if dead:
        inputs[:, n // 2] = 0
    weight = torch.randn(m, n, generator=generator)
    return weight, LayerStats(inputs.norm(dim=0), len(inputs), inputs[:8], inputs.T @ inputs)


def shrinking_inverses(gram):
    """H_F⁻¹ for F = {0, 1, …}, {1, 2, …}, …, by the elimination step of Optimal Brain Surgeon."""
    hessian = gram.double()
    live = hessian.diagonal() > 0
    hessian = hessian + torch.diag(torch.where(live, 0.01 * hessian.diagonal()[live].mean(), 1.0))
    inverse = hessian.inverse()
    while len(inverse):
        yield inverse
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]


def obs(weight, gram, mask, check):
    """Prune by OBS with a given mask; `check(j, weights, costs)` sees the state before column j is fixed."""
    inverses = list(shrinking_inverses(gram))
    denominators = torch.stack([inverse[0, 0] for inverse in inverses])
    weight = weight.double() * (gram.diagonal() > 0)
    for j, inverse in enumerate(inverses):
        check(j, weight.square() / denominators)
        error = torch.where(mask[:, j], 0, weight[:, j]) / inverse[0, 0]
        weight[:, j:] -= torch.outer(error, inverse[0])
    return weight


def is_best_choice(chosen, costs):
    """No dropped entry costs more than a kept one."""
    if chosen.all() or not chosen.any():
        return True
    return costs[chosen].min() >= costs[~chosen].max() * (1 - TOLERANCE)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(2, 300), st.sampled_from([0.3, 0.5, 0.8]), st.booleans(), st.integers(0, 999))
def test_unstructured_agrees_with_obs(m, n, ratio, dead, seed):
    assume((1 - ratio) * n + 1e-9 >= 1)
    weight, stats = problem(m, n, seed, dead and n > 8)
    result = sparsegpt(weight, stats, CompressionConfig("sparsegpt", ratio=ratio))

    def check(j, costs):
        if j % 128 == 0:  # the mask of a block is settled over all its rows when the sweep reaches it
            block = slice(j, j + 128)
            assert is_best_choice(result.mask[:, block], costs[:, block])
            kept, share = (
                int(result.mask[:, block].sum()),
                int((1 - ratio) * n + 1e-9) / n * result.mask[:, block].numel(),
            )
            assert abs(kept - share) < 1

    expected = obs(weight, stats.gram, result.mask, check)
    torch.testing.assert_close(result.dense().double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert int(result.mask.sum()) == m * int((1 - ratio) * n + 1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 50), st.sampled_from(["2:4", "4:8", "1:3"]), st.integers(0, 999))
def test_pattern_agrees_with_obs(m, groups, pattern, seed):
    survivors, size = Pattern.parse(pattern).survivors, Pattern.parse(pattern).group
    n = groups * size
    weight, stats = problem(m, n, seed)
    # The ratio allows more than the pattern: the pattern decides alone, as in the paper.
    result = sparsegpt(weight, stats, CompressionConfig("sparsegpt", ratio=0.3, pattern=pattern))

    def check(j, costs):
        if j % size == 0:  # the survivors of a group are settled row by row when the sweep reaches it
            group = slice(j, j + size)
            assert (result.mask[:, group].sum(dim=1) == survivors).all()
            for row in range(m):
                assert is_best_choice(result.mask[row, group], costs[row, group])

    expected = obs(weight, stats.gram, result.mask, check)
    torch.testing.assert_close(result.dense().double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("pattern", "n"), [("2:4", 260), ("1:3", 129), ("100:200", 400)])
def test_pattern_with_a_tighter_ratio_obeys_both(pattern, n):
    weight, stats = problem(3, n, seed=1)
    survivors, size = Pattern.parse(pattern).survivors, Pattern.parse(pattern).group
    result = sparsegpt(weight, stats, CompressionConfig("sparsegpt", ratio=0.75, pattern=pattern))
    assert int(result.mask.sum()) == 3 * int(0.25 * n)
    assert (result.mask.view(3, -1, size).sum(dim=2) <= survivors).all()
    block_size = size * max(1, 128 // size)

    def check(j, costs):
        if j % block_size == 0:  # the best of those that the pattern lets through
            block = slice(j, j + block_size)
            chosen, inside = result.mask[:, block], costs[:, block]
            groups = inside.reshape(-1, size)
            allowed = groups >= groups.topk(survivors, dim=1).values[:, -1:]
            allowed = allowed.view_as(inside)
            assert not (chosen & ~allowed).any()
            assert is_best_choice(chosen[allowed], inside[allowed])

    expected = obs(weight, stats.gram, result.mask, check)
    torch.testing.assert_close(result.dense().double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_rows_may_keep_different_numbers_of_entries():
    weight, stats = problem(4, 40, seed=0)
    weight[0] *= 100
    result = sparsegpt(weight, stats, CompressionConfig("sparsegpt", ratio=0.5))
    assert int(result.mask[0].sum()) > 30
    assert int(result.mask.sum()) == 4 * 20


def test_half_precision_weight_is_computed_in_float32():
    weight, stats = problem(3, 20, seed=2)
    config = CompressionConfig("sparsegpt", ratio=0.5)
    half = weight.to(torch.bfloat16)
    assert torch.equal(sparsegpt(half, stats, config).dense(), sparsegpt(half.float(), stats, config).dense())


def test_pattern_that_does_not_divide_the_width_is_refused():
    weight, stats = problem(2, 10, seed=0)
    with pytest.raises(SlabError, match="does not divide"):
        sparsegpt(weight, stats, CompressionConfig("sparsegpt", pattern="2:4"))


def test_pruned_weight_counts_values_and_a_bitmap():
    mask = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    weight = PrunedWeight(mask, torch.tensor([1.0, -2.0, 3.0, 0.0]))
    assert weight.shape == (2, 9)
    assert weight.dense().tolist() == [[1, 0, 0, -2, 0, 0, 0, 0, 3], [0] * 9]
    assert weight.bits() == 4 * 16
    assert weight.true_bits() == 4 * 16 + 2 * 16  # nine positions take two bytes per row
    assert weight.true_bits(value_bits=8) == 4 * 8 + 2 * 16
