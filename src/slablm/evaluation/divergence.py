"""How far a model's predictions are from the dense model's: the Kullback-Leibler divergence of the next token.

At every position, over the vocabulary and in nats,

    KL = Σ p log(p / q),     p the dense model's probabilities, q the model's

It is 0 for the same model and cannot be lowered by luck. Perplexity on a few windows is mostly the difficulty of their
text; the divergence shows what compression has changed with far fewer tokens. Its median is about ordinary tokens, its
99th percentile about those that went wrong.

Both distributions are needed at once, and logits of all windows would be gigabytes. But they are W h, of the head W and
what it is given; and where the other model has the same head and logits are nothing more, as after compression of the
blocks, the sum over the vocabulary falls on the dense side alone:

    KL = (Σ p w)ᵀ (h_p − h_q) + log Z_q − log Z_p,     log Z = log Σ exp(w h), w the head's rows

So h_p, Σ p w [hidden_size] and log Z_p of every token are kept (`DenseOutputs`): the other model's own product with the
head is the only one. In all other cases h_p goes through a copy of the dense head in every forward pass of the other
model, as one more row of the batch, so that whatever that model does with logits is done to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slablm.evaluation.perplexity import OnWindow, Perplexity, in_pieces, window_logits, window_loss
from slablm.system.float32 import fast_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows of probabilities that are multiplied with the head at a time.
_ROWS_AT_A_TIME = 256


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
        averages: of each window, over the dense probabilities, the rows of the head, [seq_len − 1, hidden_size] on the
            CPU, and the logarithms of the normalizers, [seq_len − 1]; none where logits are more than such products.
        perplexity: the dense model's.
    """

    windows: Tensor
    states: tuple[Tensor, ...]
    averages: tuple[tuple[Tensor, Tensor], ...]
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
    @fast_float32()
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
        total, done = sum(map(len, texts.values())), 0
        for name, windows in texts.items():
            losses, states, averages = [], [], []
            for index, window in enumerate(windows):
                with _watched_head(model) as seen:
                    logits = window_logits(model, window)[0]
                losses.append(window_loss(logits, window, index))
                states.append(seen.inputs.cpu())
                if seen.is_all_of(logits) and (weight := _only_weight(_head(model))) is not None:
                    averages.append(_averages(logits, weight))
                done += 1
                on_window(done, total)
            measured = Perplexity(tuple(losses), windows.shape[1] - 1)
            known[name] = DenseText(windows, tuple(states), tuple(averages), measured)
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
        own_head, head = _only_weight(_head(model)), _only_weight(self.head)
        same = own_head is not None and head is not None and torch.equal(own_head.cpu(), head.cpu())
        for name, text in self.texts.items():
            losses, tokens = [], []
            for index, window in enumerate(text.windows):
                compared = self._through_one_head(model, text, index) if same and text.averages else None
                own, apart = self._side_by_side(model, text, index) if compared is None else compared
                losses.append(window_loss(own, window, index))
                tokens.append(apart.cpu())
                done += 1
                on_window(done, total)
            results[name] = Perplexity(tuple(losses), text.windows.shape[1] - 1), summary(tokens)
        return results

    def _through_one_head(self, model: PreTrainedModel, text: DenseText, index: int) -> tuple[Tensor, Tensor] | None:
        """The model's logits of a window, and its divergence at every token; None if logits are more than products."""
        with _watched_head(model) as seen:
            logits = window_logits(model, text.windows[index])[0]
        if not seen.is_all_of(logits):
            return None
        rows, normalizers = (part.to(logits.device) for part in text.averages[index])
        differences = text.states[index][0, :-1].to(logits.device) - seen.inputs[0, :-1]
        return logits, (rows * differences).sum(dim=-1) + _normalizers(logits) - normalizers

    def _side_by_side(self, model: PreTrainedModel, text: DenseText, index: int) -> tuple[Tensor, Tensor]:
        """The same in all cases."""
        with self._beside(model, text.states[index]):
            own, dense = window_logits(model, text.windows[index])
        pairs = zip(in_pieces(dense), in_pieces(own), strict=True)
        return own, torch.cat([divergence(p, q) for p, q in pairs])

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


class _Seen:
    """What went into a head, and what came out of it."""

    inputs: Tensor
    outputs: Tensor

    def is_all_of(self, logits: Tensor) -> bool:
        """Whether nothing has been done to what came out. In 16 bits its rounding would be no part of the sums."""
        return logits.data_ptr() == self.outputs.data_ptr() and logits.dtype == self.outputs.dtype == torch.float32


@contextmanager
def _watched_head(model: PreTrainedModel) -> Iterator[_Seen]:
    """Within it, the head's last inputs and outputs are seen."""
    seen = _Seen()

    def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.inputs, seen.outputs = args[0], output

    handle = _head(model).register_forward_hook(see)
    try:
        yield seen
    finally:
        handle.remove()


def _only_weight(head: nn.Module) -> Tensor | None:
    """The rows of a head that does nothing but multiply with them, [vocabulary, hidden_size]."""
    return head.weight if type(head) is nn.Linear and head.bias is None else None


def _averages(logits: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`DenseText.averages` of a window."""
    normalizers = _normalizers(logits)
    pieces = zip(torch.split(logits, _ROWS_AT_A_TIME), torch.split(normalizers, _ROWS_AT_A_TIME), strict=True)
    return torch.cat([(rows - z[:, None]).exp_() @ weight for rows, z in pieces]).cpu(), normalizers.cpu()


def _normalizers(logits: Tensor) -> Tensor:
    """The logarithm of Σ exp of every row."""
    return torch.cat([rows.logsumexp(dim=-1) for rows in in_pieces(logits)])


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
