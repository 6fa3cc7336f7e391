"""The drift of any model against the dense one, whoever has compressed it.

`slablm.methods.drift` says what the drift is, and a run of ours measures it on its way through the blocks. Here it is
taken from whole models by hooks on their decoder blocks, so that other libraries' models are measured alike: all they
need is the same blocks in the same order. The dense model's hidden states are kept (blocks × windows × seq_len ×
hidden_size values), so that no two models need be in memory together; another model's are looked at and dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slablm.dense.targets import find_blocks
from slablm.errors import SlabError
from slablm.methods.drift import Drift, Squares
from slablm.system.finite import check_finite
from slablm.system.float32 import fast_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# (window, block, hidden states behind it [1, seq_len, hidden_size])
_See = Callable[[int, int, Tensor], None]


class DenseStreams:
    """Hidden states of the dense model; made by `of`.

    Args:
        windows: token ids, [windows, seq_len].
        hidden: per window, the hidden states behind every block, each [1, seq_len, hidden_size], on the CPU and in the
            model's type.
    """

    def __init__(self, windows: Tensor, hidden: list[list[Tensor]]) -> None:
        self._windows, self._hidden = windows, hidden

    @classmethod
    def of(cls, model: PreTrainedModel, windows: Tensor) -> DenseStreams:
        """Run the dense model.

        Args:
            model: the dense model, in eval mode.
            windows: token ids, [windows, seq_len]; a few will do, of text that calibrated nothing.

        Raises:
            SlabError: there are no windows or no decoder blocks; NaN or Inf behind a block.
        """
        if not len(windows):
            raise SlabError("there are no windows to measure the drift on: give more text")
        hidden: list[list[Tensor]] = [[] for _ in windows]
        # Copies: what is behind a block may be changed in place later on.
        _walk(model, windows, lambda window, index, states: hidden[window].append(states.to("cpu", copy=True)))
        return cls(windows, hidden)

    def drift(self, model: PreTrainedModel) -> list[Drift]:
        """The drift of another model, behind every block.

        Args:
            model: a model with the same blocks, in eval mode.

        Raises:
            SlabError: other blocks or another hidden size; NaN or Inf behind a block.
        """
        count, wanted = len(find_blocks(model)[1]), len(self._hidden[0])
        if count != wanted:
            raise SlabError(f"the model has {count} decoder blocks, the dense one has {wanted}: it is another model")
        squares: list[list[Squares]] = [[] for _ in range(count)]

        def see(window: int, index: int, states: Tensor) -> None:
            dense = self._hidden[window][index]
            if states.shape != dense.shape:
                raise SlabError(
                    f"the output of block {index} is {list(states.shape)}, the dense model's is {list(dense.shape)}: "
                    "it is another model"
                )
            squares[index].append(Squares.of(dense, states))

        _walk(model, self._windows, see)
        return [Drift.of(windows) for windows in squares]


@torch.no_grad()
@fast_float32()
def _walk(model: PreTrainedModel, windows: Tensor, see: _See) -> None:
    """Run a model on windows, one at a time, and look at what is behind every block."""
    # Without the head: its logits would cost more than all the rest.
    decoder: nn.Module = getattr(model, "base_model", model)
    current = 0

    def hook_for(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states: Tensor = output[0] if isinstance(output, tuple) else output
            check_finite(states, f"the output of block {index}")
            see(current, index, states)

        return hook

    handles = [block.register_forward_hook(hook_for(i)) for i, block in enumerate(find_blocks(model)[1])]
    try:
        for current, window in enumerate(windows):  # noqa: B007 - the hooks read it
            decoder(input_ids=window[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
