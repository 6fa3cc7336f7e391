import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.methods.allocation import RATE, Demand, allot, log_error


def loss(bits, demands):
    return sum(d.weights * 2 ** (d.importance - RATE * b) for b, d in zip(bits, demands, strict=True))


demand_lists = st.lists(
    st.builds(Demand, st.integers(10, 10_000), st.floats(-12, 12), st.floats(1.5, 2.4), st.floats(6, 9)),
    min_size=1,
    max_size=8,
)


@given(demand_lists, st.floats(2.5, 5.5), st.randoms(use_true_random=False))
def test_the_budget_is_met_and_no_exchange_does_better(demands, budget, random):
    bits = allot(budget, demands)
    total = sum(d.weights for d in demands)
    assert sum(b * d.weights for b, d in zip(bits, demands, strict=True)) == pytest.approx(budget * total, rel=1e-6)
    assert all(d.least <= b <= d.most for b, d in zip(bits, demands, strict=True))
    giver, taker = random.randrange(len(bits)), random.randrange(len(bits))
    moved = list(bits)
    moved[giver] -= 0.1 / demands[giver].weights
    moved[taker] += 0.1 / demands[taker].weights
    if moved[giver] >= demands[giver].least and moved[taker] <= demands[taker].most:
        assert loss(moved, demands) >= loss(bits, demands) * (1 - 1e-6)


def test_equal_demands_get_equal_budgets():
    bits = allot(3.5, [Demand(n, 1.7, 2.0, 9.0) for n in (10, 1000, 7)])
    assert bits == pytest.approx([3.5] * 3)


def test_bounds_that_cannot_meet_the_budget():
    assert allot(5.0, [Demand(10, 0.0, 2.0, 4.0), Demand(10, 3.0, 2.0, 4.5)]) == pytest.approx([4.0, 4.5])
    assert allot(1.0, [Demand(10, 0.0, 2.0, 4.0), Demand(10, 3.0, 2.5, 4.5)]) == pytest.approx([2.0, 2.5])


def test_a_layer_of_zeros_gets_the_least():
    assert allot(
        3.0, [Demand(10, log_error(torch.zeros(6, 4), torch.eye(4)), 2.0, 4.0), Demand(10, 0.0, 2.0, 9.0)]
    ) == pytest.approx([2.0, 4.0])


def test_error_follows_the_determinant():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 10, generator=generator) @ torch.randn(10, 10, generator=generator)
    gram, weight = inputs.T @ inputs / 200, torch.randn(6, 10, generator=generator)
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(10)
    expected = math.log2(weight.square().mean()) + torch.logdet(damped).item() / math.log(2) / 10
    assert log_error(weight, gram) == pytest.approx(expected, rel=1e-4)
    assert log_error(2 * weight, 4 * gram) == pytest.approx(expected + 4, rel=1e-4)
