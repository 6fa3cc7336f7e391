"""Perplexity as the pruning literature measures it.

The text is cut into non-overlapping windows (`slablm.calibration.windows`). Within a window every token but the first
is predicted from those before it:

    PPL = exp(mean over windows and positions of −log p(xₜ | x₍<ₜ₎))

All windows have the same length, so this is exp of the mean of the windows' mean losses, and the standard error
follows from their spread: se(PPL) ≈ PPL · s / √windows, with s the standard deviation of the window losses (delta
method). Neighbouring windows come from the same articles, so it is a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from slablm.errors import SlabError
from slablm.system.float32 import fast_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnWindow = Callable[[int, int], None]

# Logits that are gone through several times: as many as a CPU's caches hold. All of a window are 200 MB and more.
_LOGITS_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity.

    Attributes:
        window_losses: mean negative log-likelihood of each window, in nats per token.
        tokens_per_window: predicted tokens per window, seq_len − 1.
    """

    window_losses: tuple[float, ...]
    tokens_per_window: int

    @property
    def value(self) -> float:
        """Exp of the mean loss."""
        return math.exp(self._mean)

    @property
    def stderr(self) -> float:
        """Standard error of `value`; NaN for a single window."""
        count = len(self.window_losses)
        if count < 2:
            return math.nan
        variance = sum((loss - self._mean) ** 2 for loss in self.window_losses) / (count - 1)
        return self.value * math.sqrt(variance / count)

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return len(self.window_losses) * self.tokens_per_window

    @property
    def _mean(self) -> float:
        return sum(self.window_losses) / len(self.window_losses)


@torch.no_grad()
@fast_float32()
def perplexity(model: PreTrainedModel, windows: Tensor, on_window: OnWindow | None = None) -> Perplexity:
    """Measure a model's perplexity.

    Args:
        model: any causal language model, in eval mode.
        windows: token ids, [windows, seq_len] int64.
        on_window: called after each window with (windows done, windows in all).

    Raises:
        SlabError: the loss is NaN or Inf.
    """
    losses = []
    for index, window in enumerate(windows):
        losses.append(window_loss(window_logits(model, window)[0], window, index))
        if on_window is not None:
            on_window(index + 1, len(windows))
    return Perplexity(tuple(losses), windows.shape[1] - 1)


def window_logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Logits of every predicted token, [batch, seq_len − 1, vocabulary]."""
    logits: Tensor = model(input_ids=window[None].to(model.device), use_cache=False).logits[:, :-1]
    return logits


def rows_at_a_time(logits: Tensor) -> int:
    """Rows of one of `in_pieces`, the last but shorter."""
    return max(1, _LOGITS_AT_A_TIME // logits.shape[-1])


def in_pieces(logits: Tensor) -> Sequence[Tensor]:
    """Some rows at a time of logits, [rows, vocabulary]: float32 copies and exponentials of all would be large."""
    return torch.split(logits, rows_at_a_time(logits))


def window_loss(logits: Tensor, window: Tensor, index: int) -> float:
    """Mean loss of a window in nats per token, from logits [seq_len − 1, vocabulary].

    Raises:
        SlabError: it is NaN or Inf.
    """
    targets = window[1:].to(logits.device)
    pieces = zip(in_pieces(logits), torch.split(targets, rows_at_a_time(logits)), strict=True)
    total = sum(functional.cross_entropy(rows.float(), wanted, reduction="sum").item() for rows, wanted in pieces)
    loss = total / len(targets)
    if not math.isfinite(loss):
        raise SlabError(f"the loss of window {index} is {loss}: the model's numbers overflow, try --dtype float32")
    return loss
