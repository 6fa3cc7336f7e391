import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slablm.methods.descent import descent_sweep
from slablm.methods.sweep import by_column


def problem(m, n, seed):
    """Weight, a poor approximation, and a positive definite Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * n + 3, n, generator=generator) @ torch.randn(n, n, generator=generator)
    gram = inputs.T @ inputs / n
    gram.diagonal().add_(0.05 * gram.diagonal().mean())
    return torch.randn(m, n, generator=generator), torch.randn(m, n, generator=generator), gram


def error(weight, approximation, gram):
    difference = (weight - approximation).double()
    return ((difference @ gram.double()) * difference).sum().item()


@by_column
def as_it_is(block):
    return lambda j: block.weight[:, j]


def slow_descent(weight, approximation, gram, values):
    """Every entry in turn: the value with the smallest error, by trying them all."""
    result = approximation.double().clone()
    for j in range(weight.shape[1]):
        for i in range(weight.shape[0]):
            trials = []
            for value in values:
                result[i, j] = value
                trials.append((error(weight[i : i + 1], result[i : i + 1], gram), value))
            result[i, j] = min(trials)[1]
    return result


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 14), st.integers(0, 1000))
def test_every_entry_becomes_the_best_value_it_may_have(m, n, block_size, seed):
    weight, start, gram = problem(m, n, seed)
    values = torch.tensor([-1.5, -0.4, 0.3, 1.1])

    @by_column
    def plan(block):
        return lambda j: values[(block.weight[:, j, None] - values).abs().argmin(dim=1)]

    result = descent_sweep((weight - start) @ gram, start, gram, plan, block_size)
    expected = slow_descent(weight, start, gram, values.double().tolist())
    # Where two values are all but equally good, rounding may choose the other: not a worse one.
    assert error(weight, result, gram) == pytest.approx(error(weight, expected, gram), rel=1e-3)
    assert torch.isin(result, values).all()


@pytest.mark.parametrize("block_size", [1, 7, 64, 200])
def test_free_entries_descend_to_the_weight(block_size):
    weight, start, gram = problem(3, 20, 0)
    before, approximation = error(weight, start, gram), start
    for _ in range(200):
        approximation = descent_sweep((weight - approximation) @ gram, approximation, gram, as_it_is, block_size)
        after = error(weight, approximation, gram)
        assert after <= before * (1 + 1e-5) + 1e-6
        before = after
    assert after < 1e-3 * error(weight, start, gram)


def test_what_a_difference_costs():
    weight, start, gram = problem(2, 10, 1)
    costs = {}

    @by_column
    def plan(block):
        costs[block.start] = (block.weight[:, 0] - start[:, block.start]).square() / block.diagonal[0] ** 2
        return lambda j: block.weight[:, j] if j == 0 else start[:, block.start + j]

    result = descent_sweep((weight - start) @ gram, start, gram, plan, block_size=10)
    saved = [error(weight[i : i + 1], start[i : i + 1], gram) - error(weight[i : i + 1], result[i : i + 1], gram)
             for i in range(2)]  # fmt: skip
    assert costs[0].tolist() == pytest.approx(saved, rel=1e-3)
    assert torch.equal(start, problem(2, 10, 1)[1])
