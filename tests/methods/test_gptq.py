"""GPTQ at its best: against Optimal Brain Quantization written out, and every step on its own objective."""

from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slablm.config import CompressionConfig
from slablm.methods.quantizers import (
    DAMPINGS,
    best_damping,
    gptq,
    gptq_plain,
    nearest,
    rtn,
    swept,
    weighted_grids,
)
from slablm.methods.sweep import factored, falling
from tests.methods.problems import stats_of

M, N, GROUP = 48, 160, 32
CONFIG = CompressionConfig(value_bits=3, group_size=GROUP)
HALF_STEP = 0.5 + 5e-3  # float32 against float64, in steps of the grid


def problem(m, n, seed, tokens=None):
    """A weight, and Gram matrices of two samples of inputs with norms over two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    sizes = 10 ** torch.linspace(-1, 1, n)[torch.randperm(n, generator=generator)]
    inputs = torch.randn(2, tokens or 4 * n, n, generator=generator) @ mixing * sizes
    weight = torch.randn(m, n, generator=generator) * (0.5 + torch.rand(m, 1, generator=generator))
    return weight, *(x.T @ x for x in inputs)


@cache
def standard():
    return problem(M, N, seed=0)


def factor_of(gram, damping, order=None):
    """Of columns in this order, by default that of GPTQ."""
    order = falling(gram) if order is None else order
    return factored(gram[order][:, order], damping)


def error(weight, approximation, gram):
    """Tr ΔGΔᵀ in float64."""
    difference = (weight - approximation).double()
    return ((difference @ gram.double()) * difference).sum().item()


def follow_obq(weight, gram, result, damping):
    """Fix the columns one by one, largest input first, each time taking it out of the inverse by elimination."""
    hessian, current, dense = gram.double().clone(), weight.double(), result.dense().double()
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse, free, n = hessian.inverse(), list(range(len(gram))), len(gram)
    for j in sorted(range(n), key=lambda j: -gram[j, j].item()):
        scale, zero = (part[:, j // result.group_size].double() for part in (result.scales, result.zeros))
        wanted = (current[:, j] / scale + zero).clamp(0, 2**result.value_bits - 1)
        assert ((result.codes[:, j] - wanted).abs() <= HALF_STEP).all()
        at = free.index(j)
        current[:, free] -= torch.outer((current[:, j] - dense[:, j]) / inverse[at, at], inverse[at])
        inverse = inverse - torch.outer(inverse[:, at], inverse[at]) / inverse[at, at]
        rest = [place for place in range(len(free)) if place != at]
        inverse, free = inverse[rest][:, rest], [free[place] for place in rest]
    torch.testing.assert_close(dense, current)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 50), st.sampled_from([2, 3, 4]), st.integers(0, 999))
def test_gptq_agrees_with_obq(m, n, group_size, bits, seed):
    weight, gram, _ = problem(m, n, seed)
    result = gptq(weight, stats_of(gram), CompressionConfig(value_bits=bits, group_size=group_size))
    follow_obq(weight, gram, result, 0.01)


@pytest.mark.parametrize(("n", "group_size"), [(200, 64), (260, 200)])
def test_gptq_agrees_with_obq_across_blocks(n, group_size):
    weight, gram, _ = problem(2, n, seed=n)
    follow_obq(weight, gram, gptq(weight, stats_of(gram), CompressionConfig(group_size=group_size)), 0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_gptq_is_better_than_what_it_is_built_on(bits, seed):
    """On held-out tokens. Measured: 0.46 to 0.59 of rtn, 0.26 to 0.63 of gptq-plain."""
    weight, gram, held_out = problem(M, N, seed)
    config = CompressionConfig(value_bits=bits, group_size=GROUP)
    errors = {
        method: error(weight, method(weight, stats_of(gram, held_out), config).dense(), held_out)
        for method in (gptq, gptq_plain, rtn)
    }
    assert errors[gptq] < 0.7 * errors[rtn]
    assert errors[gptq] < 0.75 * errors[gptq_plain]


@settings(deadline=None, max_examples=60)
@given(st.integers(8, 24), st.integers(1, 60), st.sampled_from([4, 8, 16, 32]), st.integers(2, 8), st.integers(0, 999))
def test_gptq_is_hardly_ever_worse_than_rtn(m, n, group_size, bits, seed):
    """On G. Of 2,500 such problems it was on one by more than rounding, by 3 %: one of four columns at 8 bits."""
    weight, gram, _ = problem(m, n, seed)
    config = CompressionConfig(value_bits=bits, group_size=group_size)
    fed, each = (error(weight, method(weight, stats_of(gram), config).dense(), gram) for method in (gptq, rtn))
    assert fed <= 1.1 * each


def test_large_inputs_come_first():
    """On the same grids, against columns in their own order and in the opposite one."""
    weight, gram, _ = standard()
    grids = weighted_grids(weight, gram.diagonal(), CONFIG)
    order = falling(gram)
    assert (gram.diagonal()[order].diff() <= 0).all()
    found, natural, rising = (
        error(weight, swept(weight, factor_of(gram, 0.01, columns), grids, columns, CONFIG).dense(), gram)
        for columns in (order, torch.arange(N), order.flip(0))
    )
    assert found < 0.8 * natural  # measured: 0.72
    assert natural < 0.88 * rising  # measured: 0.78
    assert error(weight, gptq(weight, stats_of(gram), CONFIG).dense(), gram) == pytest.approx(found, rel=1e-3)


def test_groups_are_neighbours_in_the_weight_and_known_before_the_sweep():
    """Another weight in one group changes the grids of that group and no other, though the sweep mixes them all."""
    weight, gram, held_out = standard()
    other = weight.clone()
    other[:, GROUP : 2 * GROUP] *= 3
    ours, theirs = (gptq(w, stats_of(gram, held_out), CONFIG) for w in (weight, other))
    same = [g for g in range(N // GROUP) if g != 1]
    assert torch.equal(ours.scales[:, same], theirs.scales[:, same])
    assert not torch.equal(ours.codes[:, 2 * GROUP :], theirs.codes[:, 2 * GROUP :])
    assert (ours.scales[:, 1] < theirs.scales[:, 1]).all()


def test_grids_are_fitted_where_the_inputs_are_large():
    weight, gram, _ = standard()

    def objective(importance):
        lost = weight - nearest(weight, weighted_grids(weight, importance, CONFIG), CONFIG).dense()
        return (lost.square() * gram.diagonal()).sum().item()

    assert objective(gram.diagonal()) < 0.82 * objective(torch.ones(N))  # measured: 0.71


def test_dampings_are_judged_on_held_out_tokens():
    """Where what costs least by G costs most elsewhere, the less trust in G the better. (On G, the more.)"""
    weight, gram, _ = standard()
    grids = weighted_grids(weight, gram.diagonal(), CONFIG)
    order, opposite = falling(gram), gram.clone()
    opposite.diagonal().add_(1e-3 * gram.diagonal().mean())
    opposite = opposite.inverse()
    for held_out, expected in ((gram, min(DAMPINGS)), (opposite, max(DAMPINGS))):
        errors = {
            damping: error(weight, swept(weight, factor_of(gram, damping), grids, order, CONFIG).dense(), held_out)
            for damping in DAMPINGS
        }
        assert min(errors, key=errors.__getitem__) == expected
        assert best_damping(weight, partial(factor_of, gram), held_out, grids, order, CONFIG) == expected


def test_the_best_damping_is_the_result():
    """Of few tokens, which are worth less trust: all rows are in the sample, so nothing that was tried is better."""
    weight, gram, held_out = problem(M, N, seed=1, tokens=N)
    grids = weighted_grids(weight, gram.diagonal(), CONFIG)
    tried = [
        error(weight, swept(weight, factor_of(gram, damping), grids, falling(gram), CONFIG).dense(), held_out)
        for damping in DAMPINGS
    ]
    found = error(weight, gptq(weight, stats_of(gram, held_out), CONFIG).dense(), held_out)
    assert found == pytest.approx(min(tried), rel=1e-3)
    assert found < 0.97 * tried[0]  # measured: 0.93


def test_feedback_never_does_harm_on_held_out_tokens():
    weight, gram, _ = standard()
    opposite = (gram + 1e-3 * gram.diagonal().mean() * torch.eye(N)).inverse()
    result = gptq(weight, stats_of(gram, opposite), CONFIG)
    plain = nearest(weight, weighted_grids(weight, gram.diagonal(), CONFIG), CONFIG)
    assert torch.equal(result.dense(), plain.dense())


def test_weights_of_dead_inputs_widen_no_grid():
    weight, gram, _ = problem(4, 16, seed=0)
    gram[5], gram[:, 5] = 0, 0
    other = weight.clone()
    other[:, 5] = 1000
    ours, theirs = (gptq(w, stats_of(gram), CompressionConfig(group_size=16)).dense() for w in (weight, other))
    assert torch.equal(ours, theirs)
    assert (ours[:, 5] == 0).all()
