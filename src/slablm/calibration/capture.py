"""What the blocks and their linear layers see during calibration.

The decoder is walked block by block, but only the model itself knows what it hands to a block besides the hidden
states (rotary embeddings, masks, positions; in some models different ones for different blocks). So the model's own
forward runs once per window with every block replaced by one that notes its arguments and passes the hidden states
through. That costs an embedding look-up and gives, for every block, exactly the arguments of the real forward. Only
one block of each class is really run, on two tokens, to see what blocks of this class return.

Per linear layer with inputs X, [tokens, n], a collector accumulates over the windows

    d_j = ‖X[:, j]‖₂      (all methods)          XᵀX      (methods with error feedback)

(the latter perhaps twice: for the windows that are fitted, and for some that are kept back)

and keeps a few randomly chosen rows of X for measuring the output error; of further windows, which calibrate nothing,
it keeps such rows alone. The squares of every call are summed in float64 on their own, and these sums added up at the
end in the order of the windows, whichever rank ran them; XᵀX is added up pairwise (`slablm.calibration.pairwise`). So
both are the same bits for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slablm.calibration.activations import Activations
from slablm.calibration.pairwise import PairwiseSum
from slablm.distributed import ALONE, World
from slablm.errors import SlabError
from slablm.methods import LayerStats

SAMPLED_TOKENS = 512


class Use(Enum):
    """What a window is there for."""

    FIT = "gram"
    HOLD_BACK = "held_out"
    MEASURE = "unseen"


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


class _Rows:
    """Rows of a layer's inputs.

    Args:
        samples: how many are expected. Their place is taken at once: pieces kept one by one between larger tensors that
            come and go would scatter over the heap, and what lies around them could not be given back.
        in_features: n.
        device: where they are kept.
    """

    def __init__(self, samples: int, in_features: int, device: torch.device) -> None:
        self._rows, self._kept = torch.empty(samples, in_features, device=device), 0

    def add(self, rows: Tensor) -> None:
        """Keep rows, [s, n]."""
        start, self._kept = self._kept, self._kept + len(rows)
        if self._kept > len(self._rows):  # a layer that runs several times per window
            self._rows = torch.cat([self._rows, self._rows.new_empty(self._kept, self._rows.shape[1])])
        self._rows[start : self._kept] = rows

    def all(self) -> Tensor:
        """All rows so far, [s, n]."""
        return self._rows[: self._kept]


class StatsCollector:
    """Accumulates the `LayerStats` of one linear layer.

    Args:
        in_features: n.
        with_gram: whether XᵀX is wanted.
        device: where the layer runs.
        samples: rows of X that will be kept of the windows that calibrate, and of those that do not.
    """

    def __init__(
        self, in_features: int, with_gram: bool, device: torch.device, samples: tuple[int, int] = (SAMPLED_TOKENS, 0)
    ) -> None:
        self._squares: list[Tensor] = []
        self._with_gram = with_gram
        self._sums = {use: PairwiseSum() for use in (Use.FIT, Use.HOLD_BACK)}
        self._sample, self._unseen = (_Rows(count, in_features, device) for count in samples)
        self._window: tuple[Use, int] | None = None
        self._gram: Tensor | None = None
        self._tokens = 0

    def add(self, inputs: Tensor, sampled: Tensor, window: int = 0, use: Use = Use.FIT) -> None:
        """Add the inputs of one call.

        Args:
            inputs: [..., n].
            sampled: numbers, modulo the rows, of those kept for the output error.
            window: which window they are from, counted over all ranks; all calls of one come in a row.
            use: what the window is there for.
        """
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        (self._unseen if use is Use.MEASURE else self._sample).add(rows[sampled.to(rows.device) % rows.shape[0]])
        if use is Use.MEASURE:
            return
        self._squares.append(rows.square().sum(dim=0, dtype=torch.float64))
        self._tokens += rows.shape[0]
        if not self._with_gram:
            return
        if self._window != (use, window):
            self._finish_window()
            self._window = use, window
        self._gram = rows.T @ rows if self._gram is None else self._gram.addmm_(rows.T, rows)

    def part(self) -> Part:
        """What there is so far; the collector is not to be used any more."""
        self._finish_window()
        sums = {(use, *node): value for use, tree in self._sums.items() for node, value in tree.nodes.items()}
        squares = torch.stack(self._squares) if self._squares else None
        return Part(self._tokens, squares, self._sample.all(), self._unseen.all(), sums)

    def stats(self, name: str) -> LayerStats:
        """The statistics of all that was added; see `joined`."""
        return joined(name, [self.part()])

    def _finish_window(self) -> None:
        if self._window is not None and self._gram is not None:
            use, window = self._window
            self._sums[use].add((0, window), self._gram)
        self._window = self._gram = None


@dataclass(frozen=True)
class Part:
    """What one collector has seen.

    Attributes:
        tokens: number of rows of X that calibrate.
        squares: of each call Σ x², [calls, n] float64; None if there was no call.
        sample: rows of X, [s, n].
        unseen: rows of windows that do not calibrate, [s, n].
        sums: parts of XᵀX, [n, n], by use and the node of `PairwiseSum`.
    """

    tokens: int
    squares: Tensor | None
    sample: Tensor
    unseen: Tensor
    sums: dict[tuple[Use, int, int], Tensor]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All tensors by names that `from_tensors` understands."""
        named = {"sample": self.sample, "unseen": self.unseen}
        named |= {} if self.squares is None else {"squares": self.squares}
        named |= {f"{use.value} {level} {place}": value for (use, level, place), value in self.sums.items()}
        return {f"{prefix} {name}": tensor for name, tensor in named.items()}

    @classmethod
    def from_tensors(cls, tokens: int, tensors: dict[str, Tensor], prefix: str) -> Part:
        """Inverse of `tensors`; others with another prefix may be among them."""
        named = {name.removeprefix(f"{prefix} "): t for name, t in tensors.items() if name.startswith(f"{prefix} ")}
        sample, unseen, squares = named.pop("sample"), named.pop("unseen"), named.pop("squares", None)
        nodes = {name: name.split() for name in named}
        sums = {(Use(use), int(level), int(place)): named[name] for name, (use, level, place) in nodes.items()}
        return cls(tokens, squares, sample, unseen, sums)


def joined(name: str, parts: Sequence[Part]) -> LayerStats:
    """Statistics of one layer from what several collectors saw; their tensors are used up.

    Args:
        name: how errors call the layer.
        parts: of each collector, in the order of the windows.

    Raises:
        SlabError: NaN or Inf among the inputs, or no input at all.
    """
    calls = [row for part in parts if part.squares is not None for row in part.squares]
    if not calls:
        raise SlabError(f"layer {name} got no calibration inputs: leave it dense with --ignore {name}")
    squares = torch.zeros_like(calls[0])
    for row in calls:  # one after the other: no other order gives the same bits
        squares += row
    if not torch.isfinite(squares).all():
        raise SlabError(f"NaN or Inf in the inputs of layer {name}: check the weights, or use --dtype float32")
    trees = {use: PairwiseSum() for use in (Use.FIT, Use.HOLD_BACK)}
    for part in parts:
        for (use, level, place), value in part.sums.items():
            # Ranks may have shared collectors differently: a part can be asked for twice then.
            trees[use].add((level, place), value.clone() if len(parts) > 1 else value)
    sample, unseen = (torch.cat(rows) for rows in zip(*((p.sample, p.unseen) for p in parts), strict=True))
    return LayerStats(
        squares.sqrt().float(),
        sum(part.tokens for part in parts),
        sample,
        trees[Use.FIT].total(),
        trees[Use.HOLD_BACK].total(),
        unseen if len(unseen) else None,
    )


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
    """

    def __init__(self, layers: dict[str, nn.Linear], with_gram: bool, samples: tuple[int, int]) -> None:
        self._layers, self._with_gram, self._samples = layers, with_gram, samples
        self._collectors: dict[str, StatsCollector] = {}
        self._current: tuple[Tensor, int, Use] | None = None
        self._inputs: dict[str, Tensor] = {}
        self._calls = 0
        self._windows = 0
        self._may_leave = False

    def window(self, run: Callable[[], Tensor], sampled: Tensor, number: int, use: Use) -> None:
        """Run one window; the others are for `StatsCollector.add`."""
        self._current, self._calls = (sampled, number, use), 0
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
            new = StatsCollector(in_features, self._with_gram, inputs.device, self._samples)
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

    def stats(self, world: World) -> dict[str, LayerStats]:
        """The statistics of every layer, of the windows of all ranks.

        Raises:
            SlabError: see `joined`.
        """
        collectors = list({id(collector): collector for collector in self._collectors.values()}.values())
        numbers = {name: collectors.index(collector) for name, collector in self._collectors.items()}
        mine = [collector.part() for collector in collectors]
        tensors = {key: tensor for i, part in enumerate(mine) for key, tensor in part.tensors(str(i)).items()}
        told = world.gather((numbers, [part.tokens for part in mine]), tensors)
        result: dict[str, LayerStats] = {}
        made: dict[tuple[int | None, ...], LayerStats] = {}
        for name in self._layers:
            # Ranks need not have seen the same layers, nor share collectors alike.
            where = tuple(numbers.get(name) for (numbers, _), _ in told)
            if where not in made:
                parts = [
                    Part.from_tensors(tokens[number], theirs, str(number))
                    for number, ((_, tokens), theirs) in zip(where, told, strict=True)
                    if number is not None
                ]
                made[where] = joined(name, parts)
            result[name] = made[where]
        return result


def rows_per_window(windows: int) -> int:
    """Rows that are sampled of each of some windows."""
    return -(-SAMPLED_TOKENS // windows) if windows else 0


def collect_stats(
    block: nn.Module,
    layers: dict[str, nn.Linear],
    run: Callable[[int], Tensor],
    uses: Sequence[Use],
    *,
    with_gram: bool,
    seed: int,
    world: World = ALONE,
) -> dict[str, LayerStats]:
    """Run a block over all windows and return the statistics of its linear layers.

    Args:
        block: the decoder block (dense).
        layers: its target layers by full name.
        run: runs the block on window i, counted among those of this rank.
        uses: what each window of all ranks is there for.
        with_gram: whether XᵀX is wanted.
        seed: seed of the choice of sampled rows.
        world: the ranks that divide the windows.

    Returns:
        Statistics by name. Layers that share their inputs share the tensors.

    Raises:
        SlabError: see `joined` and `_BlockWatch.see`.
    """
    mine = world.share(len(uses))
    measured = [use is Use.MEASURE for use in uses]
    per_window = {kind: rows_per_window(measured.count(kind)) for kind in (False, True)}
    samples = [per_window[kind] * measured[mine.start : mine.stop].count(kind) for kind in (False, True)]
    watch = _BlockWatch(layers, with_gram, (samples[0], samples[1]))
    generator = torch.Generator().manual_seed(seed)

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args: watch.see(name, args[0])

    handles = [layer.register_forward_pre_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        for index, use in enumerate(uses):
            sampled = torch.randint(1 << 30, (per_window[measured[index]],), generator=generator)
            if index in mine:
                watch.window(partial(run, index - mine.start), sampled, index, use)
    finally:
        for handle in handles:
            handle.remove()
    return watch.stats(world)
