import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods import METHODS, LayerStats, sweep
from slablm.methods.sweep import Block, by_column, column_sweep, factored, positive


def correlated_gram(n, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * n + 3, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return inputs.T @ inputs / n


def damped(gram, damping):
    return gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


@by_column
def as_it_is(block):
    return lambda j: block.weight[:, j]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 50), st.data())
def test_free_columns_are_the_least_squares_answer_to_the_fixed_ones(m, n, block_size, data):
    # All fixed columns come first, so the rest must minimise the damped output error exactly.
    fixed = data.draw(st.integers(0, n))
    seed = data.draw(st.integers(0, 1000))
    gram, weight = correlated_gram(n, seed), torch.randn(m, n, generator=torch.Generator().manual_seed(seed))

    @by_column
    def plan(block):
        return lambda j: block.weight[:, j] * (0.25 if block.start + j < fixed else 1)

    result = column_sweep(weight, factored(gram, 0.05), plan, block_size).double()
    hessian, before = damped(gram, 0.05), weight.double()
    change = result[:, :fixed] - before[:, :fixed]
    answer = torch.linalg.solve(hessian[fixed:, fixed:], -hessian[fixed:, :fixed] @ change.T).T
    torch.testing.assert_close(result[:, fixed:], before[:, fixed:] + answer, rtol=1e-3, atol=1e-3)
    assert fixed == 0 or change.abs().max() > 0


@pytest.mark.parametrize("block_size", [1, 7, 64, 200])
def test_block_size_only_delays_the_updates(block_size):
    gram, weight = correlated_gram(150, 0), torch.randn(3, 150, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(3, 150, generator=torch.Generator().manual_seed(1)) < 0.5

    @by_column
    def plan(block):
        return lambda j: block.weight[:, j] * mask[:, block.start + j]

    result = column_sweep(weight, factored(gram), plan, block_size)
    torch.testing.assert_close(result, column_sweep(weight, factored(gram), plan), rtol=1e-3, atol=1e-3)
    assert torch.equal(result != 0, mask)


def test_plan_sees_blocks_that_carry_the_errors_so_far():
    gram, weight = correlated_gram(10, 3), torch.randn(2, 10, generator=torch.Generator().manual_seed(3))
    seen: list[Block] = []
    first_columns = []

    @by_column
    def plan(block):
        seen.append(block)

        def replace(j):
            first_columns.append(block.weight[:, 0].clone())
            if j + 1 < block.weight.shape[1]:  # live: the next column moves as soon as this one is replaced
                before.append(block.weight[:, j + 1].clone())
            return torch.zeros(2)

        before.clear()
        return replace

    before: list[torch.Tensor] = []
    column_sweep(weight, factored(gram), plan, block_size=4)
    assert [block.start for block in seen] == [0, 4, 8]
    assert [tuple(block.weight.shape) for block in seen] == [(2, 4), (2, 4), (2, 2)]
    assert torch.equal(first_columns[0], weight[:, 0])
    # With everything before them at zero, the first columns of the last block are the least-squares answer.
    hessian = damped(gram, 0.01)
    answer = weight.double()[:, 8:] + weight.double()[:, :8] @ hessian[:8, 8:] @ hessian[8:, 8:].inverse()
    torch.testing.assert_close(first_columns[8].double(), answer[:, 0], rtol=1e-3, atol=1e-3)
    # Inside the block, replacing column 8 moved column 9 before it was asked for.
    assert not torch.equal(before[0], seen[-1].weight[:, 1])
    # The squared diagonal is the OBS denominator: [H_F⁻¹]_jj of the columns from j on.
    diagonal = torch.cat([block.diagonal for block in seen]).double()
    expected = torch.stack([hessian[j:, j:].inverse()[0, 0] for j in range(10)])
    torch.testing.assert_close(diagonal.square(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (4, 9)])
def test_keeping_everything_changes_nothing_and_spares_the_callers_weight(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    assert torch.equal(column_sweep(weight, factored(correlated_gram(shape[1], 0)), as_it_is), before)
    column_sweep(
        weight, factored(correlated_gram(shape[1], 0)), by_column(lambda block: lambda j: torch.zeros(shape[0]))
    )
    assert torch.equal(weight, before)


def test_dead_inputs_start_as_zero_and_disturb_nobody():
    gram = correlated_gram(8, 1)
    gram[2], gram[:, 2] = 0, 0
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))

    @by_column
    def plan(block):
        return lambda j: block.weight[:, j] / 2

    live = [0, 1, 3, 4, 5, 6, 7]
    result = column_sweep(weight, factored(gram), plan)
    assert torch.equal(result[:, 2], torch.zeros(3))
    alone = column_sweep(weight[:, live], factored(gram[live][:, live]), plan)
    torch.testing.assert_close(result[:, live], alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(column_sweep(weight, factored(torch.zeros(8, 8)), as_it_is), torch.zeros(3, 8))


def test_the_factor_is_upper_triangular_and_squares_to_the_gram_matrix():
    gram = correlated_gram(30, 2)
    factor = factored(gram, 0.02).triangle.double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.T, damped(gram, 0.02), rtol=1e-5, atol=1e-4)


def test_scale_of_the_gram_matrix_does_not_matter():
    gram = correlated_gram(20, 4)
    gram[5], gram[:, 5] = 0, 0
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(4))

    @by_column
    def plan(block):
        return lambda j: block.weight[:, j].round()

    assert torch.equal(
        column_sweep(weight, factored(gram), plan), column_sweep(weight, factored(gram * 2.0**-20), plan)
    )


def test_damping_is_raised_until_the_factorisation_succeeds():
    gram = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # smallest eigenvalue −0.05: 1 % is too little, 10 % is enough
    torch.testing.assert_close(factored(gram, 0.01).triangle, factored(gram, 0.1).triangle)
    with pytest.raises(SlabError, match="not positive definite, even with 1 of its mean diagonal"):
        factored(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gram_that_is_not_finite_is_refused(bad):
    gram = torch.eye(3)
    gram[1, 1] = bad
    with pytest.raises(SlabError, match="infinity or NaN"):
        factored(gram)


def test_damped_and_the_sweep_mean_the_same_gram_matrix():
    gram = correlated_gram(12, 3)
    before = gram.clone()
    found = sweep.damped(gram, 0.1)
    torch.testing.assert_close(found.double(), damped(gram, 0.1))
    torch.testing.assert_close(factored(gram, 0.1).triangle, factored(found, 0).triangle)
    assert torch.equal(gram, before)


def test_norms_of_dead_inputs_become_the_smallest_of_the_others():
    assert positive(torch.tensor([3.0, 0.0, 0.5, 0.0])).tolist() == [3.0, 0.5, 0.5, 0.5]
    assert positive(torch.zeros(2)).tolist() == [1.0, 1.0]
    norms = torch.tensor([0.0, 2.0])
    positive(norms)
    assert norms.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("name", METHODS)
def test_needs_gram_names_the_methods_that_refuse_to_work_without(name):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    stats = LayerStats(torch.ones(64), 10, torch.empty(0, 64))
    config = CompressionConfig(name, ratio=None if METHODS[name].takes_true_bits else 0.3)
    if METHODS[name].needs_gram:
        with pytest.raises(SlabError, match=f"'{re.escape(name)}' needs the Gram matrix"):
            METHODS[name].function(weight, stats, config)
    else:
        assert METHODS[name].function(weight, stats, config).shape == (64, 64)
