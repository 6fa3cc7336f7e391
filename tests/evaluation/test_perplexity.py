import math

import pytest
import torch

from slablm import SlabError
from slablm.evaluation import Perplexity, perplexity


def test_against_the_models_own_loss(tiny_model):
    windows = torch.randint(3, 200, (3, 600 // 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = [tiny_model(window[None], labels=window[None]).loss.item() for window in windows]
    result = perplexity(tiny_model, windows)
    assert result.value == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert result.window_losses == pytest.approx(losses, rel=1e-5)
    assert result.tokens == 3 * 119


def test_standard_error_by_hand():
    result = Perplexity((1.0, 2.0, 3.0), 10)
    assert result.value == pytest.approx(math.e**2)
    assert result.stderr == pytest.approx(math.e**2 * 1.0 / math.sqrt(3))
    assert math.isnan(Perplexity((1.0,), 10).stderr)


def test_progress_is_reported(tiny_model):
    seen = []
    perplexity(tiny_model, torch.zeros(2, 8, dtype=torch.long), lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)]


def test_overflow_is_an_error(tiny_model):
    tiny_model.lm_head.weight.data[:] = torch.inf
    with pytest.raises(SlabError, match="the loss of window 0 is nan"):
        perplexity(tiny_model, torch.zeros(1, 8, dtype=torch.long))
