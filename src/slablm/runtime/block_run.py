"""Runs of decoder blocks for one new token: the first one asks the kernels for all, the others find their outputs made.

A model calls its blocks one after the other, and what it does between them is its own affair. So a run is a guess: that
each block will be given what the one before it returned, and the same mask, positions and cache. Whether it was right
is seen when the next block is called: by the identity of the tensors, and by the count of what was done to them in
place. Until then the caches show nothing of the new token, and a wrong guess costs its time only. Blocks that were
given other things at the last token, as those with sliding windows beside those without, begin runs of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from slablm.runtime import block_prompt, kernels
from slablm.runtime.block_given import Given, are_readable
from slablm.runtime.cache_room import Room, known_room, make_room
from slablm.runtime.decoder_block import DecoderBlock, Watch
from slablm.runtime.kernels import block as kernel


@dataclass(frozen=True)
class _Slot:
    """Where the new token of a block is, for its cache to show.

    Attributes:
        room: goes with the cache, of which nothing here must keep anything.
        count: tokens with attention, the new one included.
    """

    room: ReferenceType[Room]
    count: int


@dataclass(frozen=True)
class _Run:
    """What the kernels have made of a token.

    Attributes:
        first: block of the run.
        rotary, mask: what it was given.
        cache: likewise.
        outputs: of every block, [sequences, 1, hidden].
        slots: of every block.
        version: counts what was done to the outputs in place; they share it.
    """

    first: int
    rotary: Any
    mask: Any
    cache: ReferenceType[Any]
    outputs: tuple[Tensor, ...]
    slots: tuple[_Slot, ...]
    version: int

    def is_followed_by(self, index: int, hidden_states: Tensor, given: Given) -> bool:
        """Whether a block is given what the one before it made, and all else that the run was made with."""
        at = index - self.first
        if not 0 < at <= len(self.outputs) or hidden_states is not self.outputs[at - 1]:
            return False
        same = given.rotary is self.rotary and given.mask is self.mask and given.cache is self.cache()
        return same and _version(hidden_states) == self.version


class BlockRuns:
    """The blocks of a model that can run as a whole, in the order of the model."""

    def __init__(self) -> None:
        self._layers: list[nn.Module] = []
        self._blocks: list[DecoderBlock] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        # Whether each block followed the one before it at the last token; what was made last; and how many blocks from
        # one on are watched.
        self._follows = [False] * len(self._blocks)
        self._last: _Run | None = None
        self._watches: dict[int, tuple[int, Watch]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies, and what comes from a file, know of no token."""
        return {"_layers": self._layers, "_blocks": self._blocks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        vars(self).update(state)
        self._begin_anew()

    def add(self, layer: nn.Module, block: DecoderBlock) -> int:
        """One more block.

        Args:
            layer: the block.
            block: its parts.

        Returns:
            Its index.
        """
        self._layers.append(layer)
        self._blocks.append(block)
        self._begin_anew()
        return len(self._blocks) - 1

    def step(self, index: int, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """A block for new tokens.

        Args:
            index: of the block.
            hidden_states: its inputs.
            kwargs: what else it is called with.

        Returns:
            Its outputs, with the new keys and values in the cache; None where the block has to run itself.
        """
        given = Given.of(kwargs)
        if given is None or hidden_states.ndim != 3:
            return None
        if hidden_states.shape[1] != 1:
            return self._read(index, hidden_states, given)
        run = self._last  # another thread may set another one meanwhile
        follows = run is not None and run.is_followed_by(index, hidden_states, given)
        if run is not None and follows and index - run.first < len(run.outputs):
            outputs = self._outputs(run, index, given.cache)
            if outputs is not None:
                return outputs
        run = self._made(index, hidden_states, given)
        if run is None:
            return None
        self._follows[index] = follows
        self._last = run
        return self._outputs(run, index, given.cache)

    def _read(self, index: int, hidden_states: Tensor, given: Given) -> Tensor | None:
        """A block for many tokens, by itself."""
        block = self._blocks[index]
        if _has_global_hooks():
            return None
        description = self._watch(index, 1).description()
        return None if description is None else block_prompt.read(block, description, hidden_states, given)

    def _outputs(self, run: _Run, index: int, cache: Any) -> Tensor | None:
        """Outputs of a block that are made, unless its cache has changed since."""
        slot, layer = run.slots[index - run.first], cache.layers[self._blocks[index].index]
        room = slot.room()
        if room is None or known_room(layer) is not room:
            return None
        count = slot.count
        if layer.is_sliding:
            layer.cumulative_length += 1
            count = min(count, layer.sliding_window - 1)
        room.show(layer, count)
        return run.outputs[index - run.first]

    def _made(self, index: int, hidden_states: Tensor, given: Given) -> _Run | None:
        """The block and those that will follow it, or None if it has to run itself."""
        first, chosen, sequences = self._blocks[index], kernels.backend("cpu"), hidden_states.shape[0]
        if chosen.library is None or _has_global_hooks() or not first.has_known_attention:
            return None
        if sequences > kernel.MAX_SEQUENCES or not given.suits(hidden_states, first.shape):
            return None
        layers = self._cache_layers(index, self._end(index), sequences, given)
        description, count = self._description(index, len(layers)) if layers else (None, 0)
        if description is None:
            return None
        rooms = _rooms(layers[:count])
        counts = [layer.keys.shape[2] + 1 for layer in layers[:count]]
        places = [
            kernel.Place(room.description, room.slot + 1 - attended, room.slot)
            for room, attended in zip(rooms, counts, strict=True)
        ]
        outputs = kernel.run(
            chosen.library, chosen.name, description, hidden_states, given.rotary, places, given.contiguous_mask()
        )
        if outputs is None:  # of whichever block: each has to find out for itself
            self._follows[index : index + count] = [False] * count
            return None
        slots = tuple(map(_Slot, map(ref, rooms), counts))
        return _Run(index, given.rotary, given.mask, ref(given.cache), outputs, slots, _version(outputs[0]))

    def _cache_layers(self, index: int, end: int, sequences: int, given: Given) -> list[Any]:
        """The layers of the cache for blocks from the first on, until one that the kernels cannot append to."""
        layers: list[Any] = []
        for block in self._blocks[index:end]:
            layer = _cache_layer(given.cache, block.index)
            if layer is None:
                break
            (rows, heads, count, size), shape = layer.keys.shape, block.shape
            if (rows, heads, size) != (sequences, shape.kv_heads, shape.head_dim):
                break
            if known_room(layer) is None and not are_readable(layer.keys, layer.values):
                break
            if not given.has_readable_mask(sequences, 1, count + 1):
                break
            layers.append(layer)
        return layers

    def _description(self, index: int, count: int) -> tuple[bytes | None, int]:
        """Of so many blocks from the first on, or of fewer where one is not what it was; and of how many."""
        description = self._watch(index, count).description()
        if description is None and count > 1:
            intact = (Watch([block]).description() is not None for block in self._blocks[index : index + count])
            count = next(at for at, known in enumerate([*intact, False]) if not known)
            if count > 0:
                self._follows[index + count : index + count + 1] = [False]
                description = self._watch(index, count).description()
        return description, count

    def _watch(self, index: int, count: int) -> Watch:
        known, watch = self._watches.get(index, (0, None))
        if watch is None or known != count:
            watch = Watch(self._blocks[index : index + count])
            self._watches[index] = count, watch
        return watch

    def _end(self, index: int) -> int:
        """Behind the last block that will follow, as far as is known."""
        end, first = index + 1, self._blocks[index]
        while end < len(self._blocks) and self._follows[end]:
            layer = self._layers[end]
            hooked = layer._forward_hooks or layer._forward_pre_hooks or self._layers[end - 1]._forward_hooks
            if hooked or layer.training or not self._blocks[end].may_follow(first):
                break
            end += 1
        return end


def _has_global_hooks() -> bool:
    """Whether somebody wants to see all modules."""
    return bool(torch_modules._has_any_global_hook())  # type: ignore[no-untyped-call]


def _version(tensor: Tensor) -> int:
    """How often it was changed in place; tensors of inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


def _cache_layer(cache: Any, index: int) -> Any:
    """The layer of a cache that keys and values can be appended to, or None."""
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer: Any = cache.layers[index]
    if type(layer) is DynamicSlidingWindowLayer:
        appends = not getattr(layer, "record_past", False)  # transformers 5.18 has no such thing
    else:
        appends = type(layer) is DynamicLayer
    return layer if appends and layer.keys is not None and layer.keys.numel() > 0 else None


def _rooms(layers: list[Any]) -> list[Room]:
    """Room in every layer of a cache, made where there is none."""
    missing = [layer for layer in layers if known_room(layer) is None]
    if missing:
        make_room(missing)
    rooms = [room for room in map(known_room, layers) if room is not None]
    for room in rooms:
        room.description = room.description or kernel.describe_caches(room.keys, room.values)
    return rooms
