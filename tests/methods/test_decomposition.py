import pytest
import torch

from slablm import decompose
from slablm.methods import LayerStats
from slablm.methods.decomposition import low_rank


def test_bits_count_values_signs_and_factors():
    result = decompose(torch.randn(40, 60), ratio=0.5)
    assert result.bits() == 16 * (40 * result.kept + 100) + 40 * 60
    assert result.bits() / (16 * 40 * 60) <= 0.5
    pruned = decompose(torch.randn(40, 60), method="wanda")
    assert pruned.bits() == 16 * 40 * 30


def test_low_rank_is_the_product():
    left, right = torch.randn(7, 3), torch.randn(3, 9)
    assert torch.allclose(low_rank(left, right), left @ right, atol=1e-6)
    assert torch.equal(low_rank(left[:, :0], right[:0]), torch.zeros(7, 9))


def test_output_error_is_relative():
    weight = torch.randn(6, 8)
    stats = LayerStats(torch.ones(8), 5, torch.randn(5, 8))
    assert stats.output_error(weight, weight) == 0
    assert stats.output_error(weight, torch.zeros(6, 8)) == pytest.approx(1)
    assert stats.output_error(weight, weight * 0.9) == pytest.approx(0.1, rel=1e-4)
    assert stats.output_error(torch.zeros(6, 8), torch.zeros(6, 8)) == 0
    assert stats.unseen_error(weight, weight * 0.9) is None


def test_unseen_inputs_have_an_error_of_their_own():
    """An approximation that is exact on the calibration's inputs alone."""
    weight, seen, unseen = torch.eye(4), torch.eye(4)[:2], torch.eye(4)
    stats = LayerStats(torch.ones(4), 2, seen, unseen=unseen)
    approximation = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert stats.output_error(weight, approximation) == 0
    assert stats.unseen_error(weight, approximation) == pytest.approx(0.5**0.5)
