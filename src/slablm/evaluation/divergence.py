"""How far a model's predictions are from the dense model's: the Kullback-Leibler divergence of the next token.

At every position, over the vocabulary and in nats,

    KL = Σ p log(p / q),     p the dense model's probabilities, q the model's

It is 0 for the same model and cannot be lowered by luck. Perplexity on a few windows is mostly the difficulty of their
text; the divergence shows what compression has changed with far fewer tokens. Its median is about ordinary tokens, its
99th percentile about those that went wrong.

Both distributions are needed at once. Logits of all windows would be gigabytes, but they are one product away from what
the dense model's head is given: that is kept (`DenseOutputs`), and goes through a copy of the dense head in every
forward pass of another model, as one more row of the batch, so that whatever the model does with logits is done to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slablm.evaluation.perplexity import ROWS_AT_A_TIME, OnWindow, Perplexity, perplexity, window_logits, window_loss
from slablm.system.float32 import fast_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Divergence:
    """KL divergence of a model's next token from the dense model's, in nats per token.

    Attributes:
        window_means: mean of each window.
        median: over all tokens.
        percentile99: 99 % of all tokens are not above it.
    """

    window_means: tuple[float, ...]
    median: float
    percentile99: float

    @property
    def mean(self) -> float:
        """Mean over all tokens."""
        return sum(self.window_means) / len(self.window_means)

    def to_dict(self) -> dict[str, float]:
        """The three numbers, JSON-ready."""
        return {"mean": self.mean, "median": self.median, "percentile99": self.percentile99}


@dataclass(frozen=True)
class DenseText:
    """What the dense model makes of the windows of one text.

    Attributes:
        windows: token ids, [windows, seq_len].
        states: of each window what the head is given, [1, seq_len, hidden_size], on the CPU.
        perplexity: the dense model's.
    """

    windows: Tensor
    states: tuple[Tensor, ...]
    perplexity: Perplexity


@dataclass(frozen=True)
class DenseOutputs:
    """What the dense model makes of some texts.

    Attributes:
        texts: by name.
        head: a copy of the dense model's head.
    """

    texts: dict[str, DenseText]
    head: nn.Module

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: PreTrainedModel, texts: Mapping[str, Tensor], on_window: OnWindow = lambda done, total: None
    ) -> DenseOutputs:
        """Run the dense model.

        Args:
            model: the dense model, in eval mode.
            texts: token ids by the text's name, [windows, seq_len] each.
            on_window: called after each window with (windows done, windows in all).

        Raises:
            SlabError: a loss is NaN or Inf.
        """
        known: dict[str, DenseText] = {}
        states: list[Tensor] = []
        total, done = sum(map(len, texts.values())), 0
        handle = _head(model).register_forward_pre_hook(lambda module, args: states.append(args[0].cpu()))
        try:
            for name, windows in texts.items():
                result = perplexity(model, windows, partial(_further, on_window, done, total))
                known[name] = DenseText(windows, tuple(states[done:]), result)
                done += len(windows)
        finally:
            handle.remove()
        return cls(known, copy.deepcopy(_head(model)))

    @torch.no_grad()
    @fast_float32()
    def compare(
        self, model: PreTrainedModel, on_window: OnWindow = lambda done, total: None
    ) -> dict[str, tuple[Perplexity, Divergence]]:
        """Another model's perplexity on the same texts, and its divergence, by the text's name.

        Args:
            model: a model with the same vocabulary, in eval mode.
            on_window: as for `of`.

        Raises:
            SlabError: a loss is NaN or Inf.
        """
        results = {}
        total, done = sum(len(text.windows) for text in self.texts.values()), 0
        for name, text in self.texts.items():
            losses, tokens = [], []
            for index, (window, states) in enumerate(zip(text.windows, text.states, strict=True)):
                with self._beside(model, states):
                    own, dense = window_logits(model, window)
                losses.append(window_loss(own, window, index))
                pairs = zip(dense.split(ROWS_AT_A_TIME), own.split(ROWS_AT_A_TIME), strict=True)
                tokens.append(torch.cat([divergence(p, q) for p, q in pairs]).cpu())
                done += 1
                on_window(done, total)
            results[name] = Perplexity(tuple(losses), text.windows.shape[1] - 1), summary(tokens)
        return results

    @contextmanager
    def _beside(self, model: PreTrainedModel, states: Tensor) -> Iterator[None]:
        """Within it, the model's head returns the dense logits as a second row of the batch."""

        def append(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            dense = self.head.to(output.device)(states.to(output.device))
            return torch.cat([output, dense.to(output.dtype)])

        handle = _head(model).register_forward_hook(append)
        try:
            yield
        finally:
            handle.remove()


def _further(on_window: OnWindow, before: int, total: int, done: int, windows: int) -> None:
    """Count the windows of one text among those of all."""
    on_window(before + done, total)


def divergence(dense: Tensor, own: Tensor) -> Tensor:
    """KL divergence between rows of logits, [rows, vocabulary] twice → [rows] float32."""
    p, q = (functional.log_softmax(logits.float(), dim=-1) for logits in (dense, own))
    return functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1)


def summary(windows: list[Tensor]) -> Divergence:
    """From the divergence of every token, [tokens] of each window."""
    tokens = torch.cat(windows)
    means = tuple(values.mean(dtype=torch.float64).item() for values in windows)
    # Not torch.quantile, which refuses more than 16 million values.
    median, high = (tokens.kthvalue(math.ceil(share * len(tokens))).values.item() for share in (0.5, 0.99))
    return Divergence(means, median, high)


def _head(model: PreTrainedModel) -> nn.Module:
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head
