"""Room for new tokens in transformers' own caches.

A `DynamicCache` grows by concatenation: each new token copies all keys and values there are. Here its tensors become
views of larger ones, into which the next token is written; they are made anew when they are full. Whoever reads the
cache sees tensors of the shapes, types and numbers that it would have had.

Only the cache layer that room was made for may write there: `_ROOMS` has one per layer, and it holds only as long as
the layer has the very tensors that it was given. Copies of a cache, crops and whatever else sets other tensors begin
anew.

Making two views for each layer takes longer than many a product: layers that get room together have it on one shelf,
and their views are made together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

# When room is made, it is for half as many tokens again, and so many at least.
_LEAST_ROOM = 64
# Larger caches are moved layer by layer, so that there is never all of them twice.
_MOST_ON_A_SHELF = 32 * 2**20


class _Shelf:
    """Keys and values of some layers.

    Args:
        whole: [2 · layers, sequences, kv_heads, capacity, head_dim], keys and values in turns.
    """

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self._range: tuple[int, int] | None = None
        self._views: tuple[Tensor, ...] = ()

    def views(self, place: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, of so many tokens; the same tensors if it is asked again for the same."""
        if self._range != (first, count):
            self._views, self._range = self.whole.narrow(3, first, count).unbind(0), (first, count)
        return self._views[2 * place], self._views[2 * place + 1]


@dataclass
class Room:
    """Keys and values of one layer of a cache, in larger tensors.

    Attributes:
        keys: [sequences, kv_heads, capacity, head_dim].
        values: likewise.
        slot: where the next token goes; what is behind it may be anything.
        shown: the keys and values that the layer of the cache has, views of the last tokens before `slot`.
        shelf: what has the room.
        place: on the shelf.
        description: of keys and values, whatever whoever makes room needs.
    """

    keys: Tensor
    values: Tensor
    slot: int
    shown: tuple[Tensor, Tensor]
    shelf: _Shelf
    place: int
    description: bytes = b""

    def show(self, layer: Any, count: int) -> None:
        """One more token is in its slot: let the layer of the cache have the last `count`."""
        self.slot += 1
        self.shown = layer.keys, layer.values = self.shelf.views(self.place, self.slot - count, count)


_ROOMS: WeakKeyDictionary[Any, Room] = WeakKeyDictionary()


def known_room(layer: Any) -> Room | None:
    """The room that there is for one more token.

    Args:
        layer: of a cache.
    """
    room = _ROOMS.get(layer)
    if room is None or room.shown[0] is not layer.keys or room.shown[1] is not layer.values:
        return None
    return room if room.slot < room.keys.shape[2] else None


def make_room(layers: Sequence[Any]) -> None:
    """Room for more tokens; the layers' tensors stay as they are until `Room.show`.

    Args:
        layers: of a `DynamicCache`, not empty, with keys and values of the same shapes and types each.
    """
    kinds = {(layer.keys.shape, layer.keys.dtype) for layer in layers}
    together = len(kinds) == 1 and len(layers) * 2 * layers[0].keys.nbytes <= _MOST_ON_A_SHELF
    for group in [layers] if together else [[layer] for layer in layers]:
        _make_shelf(group)


def _make_shelf(layers: Sequence[Any]) -> None:
    sequences, heads, count, size = layers[0].keys.shape
    shape = (2 * len(layers), sequences, heads, count + max(_LEAST_ROOM, count // 2), size)
    shelf = _Shelf(layers[0].keys.new_empty(shape))
    tensors = shelf.whole.unbind(0)
    for place, layer in enumerate(layers):
        keys, values = tensors[2 * place : 2 * place + 2]
        keys[:, :, :count], values[:, :, :count] = layer.keys, layer.values
        _ROOMS[layer] = Room(keys, values, count, (layer.keys, layer.values), shelf, place)
