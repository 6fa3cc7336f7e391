import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slablm.config import CompressionConfig, Pattern
from slablm.errors import SlabError
from slablm.methods import METHODS, LayerStats
from slablm.methods.ablation import LOWRANK_RANK, sparse, sparse_lowrank, sparse_scalar_binary
from slablm.methods.pruning import wanda

ARMS = ["sparse", "sparse+lowrank", "sparse+scalar-binary"]


def problem(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator) + torch.randn(m, 4, generator=generator) @ torch.randn(
        4, n, generator=generator
    )
    return weight, LayerStats(0.1 + torch.rand(n, generator=generator), 100, torch.empty(0, n))


def best_of_rows(scores, k):
    """The k largest of every row, by sorting."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    return mask.scatter_(1, scores.argsort(dim=1, descending=True)[:, :k], True)


def alternate_slowly(weight, norms, k, iterations, background_of):
    """The definition in float64: (W_S, background) after the last round."""
    weight, background = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for _ in range(iterations):
        candidate = weight - background
        kept = torch.where(best_of_rows(candidate.abs() * norms.double(), k), candidate, 0)
        background = background_of(weight - kept)
    return kept, background


def best_low_rank(residual):
    u, s, vt = torch.linalg.svd(residual)
    return u[:, :LOWRANK_RANK] * s[:LOWRANK_RANK] @ vt[:LOWRANK_RANK]


def row_by_row(residual):
    """Every row fitted to its own signs by a least-squares solver."""
    signs = torch.where(residual < 0, -1.0, 1.0).double()
    rows = [s * torch.linalg.lstsq(s[:, None], r[:, None]).solution for s, r in zip(signs, residual, strict=True)]
    return torch.stack([row[0] for row in rows])


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparse_is_wanda_with_the_whole_budget(pattern):
    weight, stats = problem(8, 32, 0)
    config = CompressionConfig("sparse", ratio=0.6, pattern=pattern)
    ours, theirs = sparse(weight, stats, config), wanda(weight, stats, config)
    assert torch.equal(ours.mask, theirs.mask)
    assert torch.equal(ours.dense(), theirs.dense())
    assert ours.kept == math.floor(0.4 * 32)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 12), st.integers(8, 60), st.integers(0, 999))
def test_scalar_binary_first_round_agrees_with_least_squares(m, n, seed):
    weight, stats = problem(m, n, seed)
    config = CompressionConfig("sparse+scalar-binary", ratio=0.25, iterations=1)
    k = math.floor((1 - 0.25 - 1 / 16 - (m + n) / (m * n)) * n + 1e-9)
    assume(k >= 1)
    result = sparse_scalar_binary(weight, stats, config)
    kept, background = alternate_slowly(weight, stats.input_norms, k, 1, row_by_row)
    assert torch.equal(result.mask, kept != 0)
    torch.testing.assert_close(result.dense().double(), kept + background, rtol=1e-5, atol=1e-5)


def test_scalar_binary_agrees_with_its_definition_after_all_rounds():
    weight, stats = problem(48, 64, 3)
    k = math.floor((0.5 - 1 / 16 - (48 + 64) / (48 * 64)) * 64)
    result = sparse_scalar_binary(weight, stats, CompressionConfig("sparse+scalar-binary"))
    expected = sum(alternate_slowly(weight, stats.input_norms, k, 20, row_by_row))
    error, best = (weight - result.dense()).norm(), (weight - expected).norm()
    assert error.item() == pytest.approx(best.item(), rel=1e-3)
    assert torch.equal(result.right, torch.ones(1, 64))
    assert (result.left > 0).all()


@settings(deadline=None, max_examples=10)
@given(st.integers(80, 120), st.integers(80, 120), st.integers(0, 999))
def test_lowrank_first_round_is_close_to_the_svd(m, n, seed):
    weight, stats = problem(m, n, seed)
    config = CompressionConfig("sparse+lowrank", ratio=0.3, iterations=1)
    k = math.floor((0.7 - 16 * (m + n) / (m * n)) * n + 1e-9)
    result = sparse_lowrank(weight, stats, config)
    kept, background = alternate_slowly(weight, stats.input_norms, k, 1, best_low_rank)
    assert torch.equal(result.mask, kept != 0)
    residual = weight.double() - kept
    ours = (result.left @ result.right).double()
    assert (residual - ours).norm() <= 1.005 * (residual - background).norm()
    # Folded: a kept entry holds W_S + W_L.
    torch.testing.assert_close(result.dense().double(), kept + ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(96, 128), (128, 96)])
def test_lowrank_agrees_with_its_definition_after_all_rounds(shape):
    weight, stats = problem(*shape, 5)
    config = CompressionConfig("sparse+lowrank", ratio=0.4)
    k = math.floor((0.6 - 16 * sum(shape) / math.prod(shape)) * shape[1])
    expected = sum(alternate_slowly(weight, stats.input_norms, k, 20, best_low_rank))
    error, best = (weight - sparse_lowrank(weight, stats, config).dense()).norm(), (weight - expected).norm()
    assert error.item() == pytest.approx(best.item(), rel=1e-2)


def test_lowrank_has_rank_16_no_signs_and_ignores_the_rank_of_slab():
    weight, stats = problem(96, 128, 0)
    configs = [CompressionConfig("sparse+lowrank", ratio=0.3, rank=rank) for rank in (1, 3)]
    results = [sparse_lowrank(weight, stats, config) for config in configs]
    assert results[0].rank == 16
    assert results[0].signs is None
    assert torch.equal(results[0].dense(), results[1].dense())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_uses_its_budget_and_no_more(arm, pattern):
    m, n = 144, 160
    weight, stats = problem(m, n, 1)
    result = METHODS[arm].function(weight, stats, CompressionConfig(arm, ratio=0.5, pattern=pattern))
    budget = 0.5 * 16 * m * n
    assert budget - 16 * m < result.bits() <= budget
    assert (result.mask.sum(dim=1) == result.kept).all()
    if (parsed := Pattern.parse(pattern)) is not None:
        assert (result.mask.view(m, -1, parsed.group).sum(dim=2) <= parsed.survivors).all()


def test_layer_too_small_for_rank_16_is_refused():
    weight, stats = problem(24, 24, 0)
    with pytest.raises(SlabError, match="at rank 16"):
        sparse_lowrank(weight, stats, CompressionConfig("sparse+lowrank", ratio=0.5))
