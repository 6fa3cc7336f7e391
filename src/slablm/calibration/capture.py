"""What the blocks and their linear layers see during calibration.

The decoder is walked block by block, but only the model itself knows what it hands to a block besides the hidden
states (rotary embeddings, masks, positions; in some models different ones for different blocks). So the model's own
forward runs once per window with every block replaced by one that notes its arguments and passes the hidden states
through. That costs an embedding look-up and gives, for every block, exactly the arguments of the real forward.

Per linear layer with inputs X, [tokens, n], a collector accumulates over the windows

    d_j = ‖X[:, j]‖₂      (all methods)          XᵀX      (methods with error feedback)

and keeps a few randomly chosen rows of X for measuring the output error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slablm.errors import SlabError
from slablm.methods import LayerStats

SAMPLED_TOKENS = 512


@dataclass
class BlockCall:
    """How the model calls one block, apart from the hidden states: the remaining arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run the block on hidden states [1, seq_len, hidden_size] and return the new ones."""
        output = block(hidden, *self.args, **self.kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states


@torch.no_grad()
def capture_block_calls(
    model: nn.Module, blocks: nn.ModuleList, windows: Tensor, device: torch.device
) -> tuple[list[Tensor], list[BlockCall]]:
    """The first block's inputs for every window, and how each block is called.

    Args:
        model: the causal language model.
        blocks: its decoder blocks.
        windows: token ids, [windows, seq_len].
        device: where the model runs.

    Returns:
        Hidden states, one [1, seq_len, hidden_size] per window; one `BlockCall` per block.

    Raises:
        SlabError: a block's arguments depend on the text, so one window's cannot serve the others.
    """
    # Without the head: its logits would cost more than all the rest here.
    decoder: nn.Module = getattr(model, "base_model", model)
    lengths = _tuple_lengths(decoder, blocks, windows[:1, :2].to(device))
    hidden: list[Tensor] = []
    first: list[BlockCall] = []
    for window in windows:
        with _noting_blocks(blocks, lengths) as calls:
            decoder(input_ids=window[None].to(device), use_cache=False)
        hidden.append(calls[0][0])
        current = [call for _, call in calls]
        if not first:
            first = current
        elif not all(_same(a.kwargs, b.kwargs) and _same(a.args, b.args) for a, b in zip(first, current, strict=True)):
            raise SlabError(f"{type(model).__name__} hands its blocks arguments that depend on the text: not supported")
    return hidden, first


def _tuple_lengths(decoder: nn.Module, blocks: nn.ModuleList, tokens: Tensor) -> list[int | None]:
    """For each block, how many elements the tuple it returns has (None: it returns a tensor); runs all once."""
    lengths: list[int | None] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        lengths.append(len(output) if isinstance(output, tuple) else None)

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        decoder(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return lengths


@contextmanager
def _noting_blocks(blocks: nn.ModuleList, lengths: list[int | None]) -> Iterator[list[tuple[Tensor, BlockCall]]]:
    """Replace every block's forward by one that notes its arguments and returns the hidden states unchanged."""
    calls: list[tuple[Tensor, BlockCall]] = []

    def note_for(length: int | None) -> Callable[..., Any]:
        def note(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((hidden_states, BlockCall(args, kwargs)))
            return hidden_states if length is None else (hidden_states, *[None] * (length - 1))

        return note

    # accelerate's device hooks also live in the instance's `forward`; put back whatever was there.
    own = [block.__dict__.get("forward") for block in blocks]
    for block, length in zip(blocks, lengths, strict=True):
        block.forward = note_for(length)
    try:
        yield calls
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward  # uncovers the class's own
            if forward is not None:
                block.forward = forward


def _same(a: Any, b: Any) -> bool:
    """Equality of nested arguments; tensors by content."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (bool, int, float, str)) or a is None:
        return bool(a == b)
    # Objects without a meaningful == (an empty cache, say): before the first block they hold no text.
    return type(a) is type(b)


class StatsCollector:
    """Accumulates the `LayerStats` of one linear layer.

    Args:
        in_features: n.
        with_gram: whether XᵀX is wanted.
        device: where the layer runs.
    """

    def __init__(self, in_features: int, with_gram: bool, device: torch.device) -> None:
        self._squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._gram = torch.zeros(in_features, in_features, device=device) if with_gram else None
        self._rows: list[Tensor] = []
        self._tokens = 0

    def add(self, inputs: Tensor, sampled: Tensor) -> None:
        """Add inputs [..., n]; `sampled` are the numbers, modulo the rows, of those kept for the output error."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self._squares += rows.square().sum(dim=0, dtype=torch.float64)
        if self._gram is not None:
            self._gram.addmm_(rows.T, rows)
        self._rows.append(rows[sampled.to(rows.device) % rows.shape[0]])
        self._tokens += rows.shape[0]

    def stats(self, name: str) -> LayerStats:
        """The statistics so far.

        Raises:
            SlabError: NaN or Inf among the inputs, or no input at all.
        """
        if not self._tokens:
            raise SlabError(f"layer {name} got no calibration inputs: leave it dense with --ignore {name}")
        if not torch.isfinite(self._squares).all():
            raise SlabError(f"NaN or Inf in the inputs of layer {name}: check the weights, or use --dtype float32")
        return LayerStats(self._squares.sqrt().float(), self._tokens, torch.cat(self._rows), self._gram)


def collect_stats(
    block: nn.Module,
    layers: dict[str, nn.Linear],
    run: Callable[[int], Tensor],
    num_windows: int,
    *,
    with_gram: bool,
    seed: int,
) -> dict[str, LayerStats]:
    """Run a block over all windows and return the statistics of its linear layers.

    Args:
        block: the decoder block (dense).
        layers: its target layers by full name.
        run: runs the block on window i.
        num_windows: number of windows.
        with_gram: whether XᵀX is wanted.
        seed: seed of the choice of sampled rows.

    Raises:
        SlabError: see `StatsCollector.stats`.
    """
    collectors = {
        name: StatsCollector(layer.in_features, with_gram, layer.weight.device) for name, layer in layers.items()
    }
    generator = torch.Generator().manual_seed(seed)
    per_window = -(-SAMPLED_TOKENS // num_windows)
    sampled = torch.empty(0, dtype=torch.long)

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args, output: collectors[name].add(args[0], sampled)

    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        for index in range(num_windows):
            sampled = torch.randint(1 << 30, (per_window,), generator=generator)
            run(index)
    finally:
        for handle in handles:
            handle.remove()
    return {name: collector.stats(name) for name, collector in collectors.items()}
