"""What the blocks and their linear layers see during calibration.

The decoder is walked block by block, but only the model itself knows what it hands to a block besides the hidden
states (rotary embeddings, masks, positions; in some models different ones for different blocks). So the model's own
forward runs once per window with every block replaced by one that notes its arguments and passes the hidden states
through. That costs an embedding look-up and gives, for every block, exactly the arguments of the real forward. Only
one block of each class is really run, on two tokens, to see what blocks of this class return.

Then each block is run on all windows, and the inputs of its linear layers go to collectors
(`slablm.calibration.statistics`). In a mixture of experts every token counts for every expert, sent there or not: gate
and up of all experts share one XᵀX then, and no expert has too few tokens for its own. How many are sent is noted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from slablm.calibration.activations import Activations
from slablm.calibration.pairwise import leaf_of, share
from slablm.calibration.statistics import Joint, StatsCollector, Use, rows_per_window
from slablm.errors import SlabError
from slablm.methods import LayerStats
from slablm.runtime.experts import Experts, all_tokens
from slablm.system.distributed import ALONE, World

_NARROW = (torch.float16, torch.bfloat16)


@dataclass
class BlockCall:
    """How the model calls one block, apart from the hidden states: the remaining arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Run the block on hidden states [1, seq_len, hidden_size] and return the new ones."""
        output = block(hidden, *self.args, **self.kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def widened(self) -> BlockCall:
        """The call of a block in float32: tensors of 16-bit numbers among the arguments become such."""
        args, kwargs = tree_map(_wide, (self.args, self.kwargs))
        return BlockCall(args, kwargs)


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """Within it, a block's 16-bit tensors are in float32; then they are what they were.

    Args:
        block: dense.
    """
    narrow = [(t, t.dtype) for t in (*block.parameters(), *block.buffers()) if t.dtype in _NARROW]
    try:
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)


@torch.no_grad()
def capture_block_calls(
    model: nn.Module,
    blocks: nn.ModuleList,
    windows: Tensor,
    device: torch.device,
    *,
    load: Callable[[int], None] = lambda index: None,
    hidden: Activations | None = None,
) -> tuple[Activations, list[BlockCall]]:
    """The first block's inputs for every window, and how each block is called.

    Args:
        model: the causal language model.
        blocks: its decoder blocks.
        windows: token ids, [windows, seq_len].
        device: where the model runs.
        load: called before a block is run for real, which happens once per class of blocks.
        hidden: where the hidden states go; by default into RAM.

    Returns:
        Hidden states, one [1, seq_len, hidden_size] per window; one `BlockCall` per block.

    Raises:
        SlabError: a block's arguments depend on the text, so one window's cannot serve the others.
    """
    # Without the head: its logits would cost more than all the rest here.
    decoder: nn.Module = getattr(model, "base_model", model)
    hidden = Activations(len(windows)) if hidden is None else hidden
    outputs = _Outputs(load)
    first: list[BlockCall] = []
    with _noting_blocks(blocks, outputs):
        decoder(input_ids=windows[:1, :2].to(device), use_cache=False)
    for window in windows:
        with _noting_blocks(blocks, outputs) as calls:
            decoder(input_ids=window[None].to(device), use_cache=False)
        hidden.append(calls[0][0])
        current = [call for _, call in calls]
        if not first:
            first = current
        elif not all(_same(a.kwargs, b.kwargs) and _same(a.args, b.args) for a, b in zip(first, current, strict=True)):
            raise SlabError(f"{type(model).__name__} hands its blocks arguments that depend on the text: not supported")
    return hidden, first


class _Outputs:
    """What the blocks return: hidden states alone, or a tuple that starts with them. Blocks of one class are alike.

    Args:
        load: see `capture_block_calls`.
    """

    def __init__(self, load: Callable[[int], None]) -> None:
        self._load = load
        self._lengths: dict[type[nn.Module], int | None] = {}

    def of(self, index: int, block: nn.Module, run: Callable[[], Any], hidden_states: Tensor) -> Any:
        """What the block would return if it left the hidden states as they are; runs a block of an unknown class."""
        if type(block) not in self._lengths:
            self._load(index)
            output = run()
            self._lengths[type(block)] = len(output) if isinstance(output, tuple) else None
        length = self._lengths[type(block)]
        return hidden_states if length is None else (hidden_states, *[None] * (length - 1))


@contextmanager
def _noting_blocks(blocks: nn.ModuleList, outputs: _Outputs) -> Iterator[list[tuple[Tensor, BlockCall]]]:
    """Replace every block's forward by one that notes its arguments and returns the hidden states unchanged."""
    calls: list[tuple[Tensor, BlockCall]] = []

    def note_for(index: int, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def note(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((hidden_states, BlockCall(args, kwargs)))
            return outputs.of(index, block, lambda: forward(hidden_states, *args, **kwargs), hidden_states)

        return note

    # accelerate's device hooks also live in the instance's `forward`; put back whatever was there.
    own = [block.__dict__.get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = note_for(index, block, block.forward)
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


class _AllSeen(Exception):  # noqa: N818 - no error: what is left of the block is of no interest
    """Every target layer of the block has got its inputs."""


class _BlockWatch:
    """Hands the inputs of a block's linear layers to collectors.

    Two things are not done twice. Layers that read the very same tensor (q, k and v; gate and up) share one collector.
    And a block is left as soon as its last target layer is reached: that layer's product, a quarter of a Llama block,
    is not needed. Both are learned from the first window.

    Args:
        layers: target layers by full name.
        with_gram: whether XᵀX is wanted.
        samples: rows that each layer's collector will keep, as for `StatsCollector`.
        alone: as for `StatsCollector`.
    """

    def __init__(self, layers: dict[str, nn.Linear], with_gram: bool, samples: tuple[int, int], alone: bool) -> None:
        self._routed: dict[Experts, Tensor] = {}
        self._layers, self._with_gram, self._samples, self._alone = layers, with_gram, samples, alone
        self._collectors: dict[str, StatsCollector] = {}
        self._current: tuple[Tensor, int, Use] | None = None
        self._inputs: dict[str, Tensor] = {}
        self._calls = 0
        self._windows = 0
        self._may_leave = False

    def window(self, run: Callable[[], Tensor], sampled: Tensor, leaf: int, use: Use) -> None:
        """Run one window; the others are for `StatsCollector.add`."""
        self._current, self._calls = (sampled, leaf, use), 0
        with suppress(_AllSeen):
            run()
        if not self._windows:
            # A layer that runs several times per window has to be seen every time.
            self._may_leave = self._calls == len(self._inputs) == len(self._layers)
        self._inputs.clear()
        self._windows += 1

    def see(self, name: str, inputs: Tensor) -> None:
        """Note the inputs of one call of one layer.

        Raises:
            SlabError: layers that shared their inputs in the first window do so no more.
        """
        twin = next((other for other, tensor in self._inputs.items() if tensor is inputs and other != name), None)
        if name not in self._collectors:
            in_features = self._layers[name].in_features
            new = StatsCollector(in_features, self._with_gram, inputs.device, self._samples, self._alone)
            self._collectors[name] = new if twin is None or self._windows else self._collectors[twin]
        collector = self._collectors[name]
        if twin is None or self._collectors[twin] is not collector:
            if any(self._collectors[other] is collector for other in self._inputs if other != name):
                raise SlabError(f"layer {name} shares its inputs with others in some windows only: use --ignore {name}")
            assert self._current is not None
            collector.add(inputs, *self._current)
        self._inputs[name] = inputs
        self._calls += 1
        if self._may_leave and len(self._inputs) == len(self._layers):
            raise _AllSeen

    def route(self, experts: Experts, chosen: Tensor) -> None:
        """Note which experts the tokens of a window are sent to, [tokens, k]."""
        assert self._current is not None
        if self._current[2] is not Use.MEASURE:
            counts = chosen.flatten().bincount(minlength=experts.num_experts).cpu()
            self._routed[experts] = self._routed.get(experts, 0) + counts

    def _routed_to(self) -> dict[str, int]:
        """Tokens that were sent to the expert of each layer that is one's."""
        owned = {
            id(layer): int(counts[number])
            for experts, counts in self._routed.items()
            for number in range(experts.num_experts)
            for layer in experts.get_submodule(str(number)).children()
        }
        return {name: owned[id(layer)] for name, layer in self._layers.items() if id(layer) in owned}

    def stats(self, world: World, owners: Mapping[str, int]) -> dict[str, LayerStats | None]:
        """Statistics of the windows of all ranks; see `collect_stats`."""
        # A collector is called by the first of its layers. Ranks need not have seen the same ones, nor share alike.
        first: dict[int, str] = {}
        keys = {name: first.setdefault(id(collector), name) for name, collector in self._collectors.items()}
        collectors = {key: self._collectors[key] for key in keys.values()}
        counts = {key: (collector.tokens, collector.fitted) for key, collector in collectors.items()}
        told = [notes for notes, _ in world.gather((keys, counts, self._routed_to()), {})]
        sources = {name: tuple(theirs.get(name) for theirs, _, _ in told) for name in self._layers}

        def number(where: tuple[str | None, ...], kind: int) -> int:
            return sum(theirs[key][kind] for key, (_, theirs, _) in zip(where, told, strict=True) if key is not None)

        reached = {name: where for name, where in sources.items() if number(where, 1)}
        mine = {name: where for name, where in reached.items() if owners[name] == world.rank}
        joint = {where: Joint() for where in mine.values()}
        self._collectors.clear()
        for rank, key, piece, value in _delivered(collectors, keys, owners, world):
            wanted = [one for where, one in joint.items() if where[rank] == key]
            for one in wanted:
                one.add(rank, piece, value.clone() if len(wanted) > 1 else value)
        made: dict[tuple[str | None, ...], LayerStats] = {}
        readers = Counter(mine.values())
        result: dict[str, LayerStats | None] = dict.fromkeys(reached)
        for name, where in mine.items():
            if where not in made:
                kept: dict[Hashable, Any] | None = {} if readers[where] > 1 else None
                made[where] = replace(joint[where].stats(name, number(where, 0)), kept=kept)
            routed = [theirs[name] for _, _, theirs in told if name in theirs]
            result[name] = replace(made[where], routed=sum(routed)) if routed else made[where]
        return result


def _delivered(
    collectors: dict[str, StatsCollector], keys: dict[str, str], owners: Mapping[str, int], world: World
) -> Iterator[tuple[int, str, str, Tensor]]:
    """Pieces of all collectors that this rank wants: (rank, collector, piece, value); `collectors` is used up."""
    readers = {key: {owners[name] for name, theirs in keys.items() if theirs == key} for key in collectors}
    pieces: dict[str, Tensor] = {}
    wanted: dict[str, set[int]] = {}
    for key in list(collectors):
        for piece, value in collectors.pop(key).pieces().items():
            pieces[f"{key}/{piece}"], wanted[f"{key}/{piece}"] = value, readers[key]
    for rank, name, value in world.deliver(pieces, wanted):
        key, piece = name.split("/")
        yield rank, key, piece, value


def collect_stats(  # noqa: PLR0913
    block: nn.Module,
    layers: dict[str, nn.Linear],
    run: Callable[[int], Tensor],
    uses: Sequence[Use],
    *,
    with_gram: bool,
    seed: int,
    world: World = ALONE,
    owners: Mapping[str, int] | None = None,
) -> dict[str, LayerStats | None]:
    """Run a block over all windows and return the statistics of its linear layers.

    Args:
        block: the decoder block (dense).
        layers: its target layers by full name.
        run: runs the block on window i, counted among those of this rank.
        uses: what each window of all ranks is there for.
        with_gram: whether XᵀX is wanted.
        seed: seed of the choice of sampled rows.
        world: the ranks that divide the windows.
        owners: the rank that wants the statistics of each layer; by default rank 0.

    Returns:
        Statistics by name, of the layers that a fitted token has reached; None where another rank has them. Layers that
        share their inputs share the tensors.

    Raises:
        SlabError: see `Joint.stats` and `_BlockWatch.see`.
    """
    mine = share(world, len(uses))
    measured = [use is Use.MEASURE for use in uses]
    per_window = {kind: rows_per_window(measured.count(kind)) for kind in (False, True)}
    samples = [per_window[kind] * measured[mine.start : mine.stop].count(kind) for kind in (False, True)]
    watch = _BlockWatch(layers, with_gram, (samples[0], samples[1]), world.size == 1)
    generator = torch.Generator().manual_seed(seed)

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args: watch.see(name, args[0])

    handles = [layer.register_forward_pre_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        with all_tokens(block, watch.route):
            for index, use in enumerate(uses):
                sampled = torch.randint(1 << 30, (per_window[measured[index]],), generator=generator)
                if index in mine:
                    watch.window(partial(run, index - mine.start), sampled, leaf_of(index, len(uses)), use)
    finally:
        for handle in handles:
            handle.remove()
    return watch.stats(world, dict.fromkeys(layers, 0) if owners is None else owners)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _NARROW else value
