import pytest
import torch

from slablm import decompose
from tests import reference


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_pruners_keep_the_best_entries_unchanged(method, pattern):
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(24, 32, generator=generator), torch.rand(32, generator=generator)
    result = decompose(weight, norms, method=method, pattern=pattern)
    scores = weight.abs() * norms if method == "wanda" else weight.abs()
    mask = reference.top_k(scores, 16, None if pattern == "unstructured" else (2, 4))
    assert torch.equal(result.dense(), torch.where(mask, weight, 0.0))
    assert result.signs is None
    assert result.rank == 0


def test_a_pattern_caps_the_budget():
    assert decompose(torch.randn(8, 16), method="wanda", ratio=0.25, pattern="2:4").kept == 8
