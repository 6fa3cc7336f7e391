"""Room for new tokens in transformers' own caches.

A `DynamicCache` grows by concatenation: each new token copies all keys and values there are. Here its tensors become
views of larger ones, into which the next token is written; they are made anew when they are full. Whoever reads the
cache sees tensors of the shapes, types and numbers that it would have had.

Only the cache layer that room was made for may write there: `_ROOMS` has one per layer, and it holds only as long as
the layer has the very tensors that it was given. Copies of a cache, crops and whatever else sets other tensors begin
anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

# When room is made, it is for half as many tokens again, and so many at least.
_LEAST_ROOM = 64


@dataclass
class Room:
    """Keys and values of one layer of a cache, in larger tensors.

    Attributes:
        keys: [sequences, kv_heads, capacity, head_dim].
        values: likewise.
        slot: where the next token goes; what is behind it may be anything.
        shown: the keys and values that the layer of the cache has, views of the last tokens before `slot`.
        description: of keys and values, whatever whoever makes room needs.
    """

    keys: Tensor
    values: Tensor
    slot: int
    shown: tuple[Tensor, Tensor]
    description: bytes = b""

    def show(self, layer: Any, count: int) -> None:
        """One more token is in its slot: let the layer of the cache have the last `count`."""
        self.slot += 1
        first = self.slot - count
        self.shown = self.keys.narrow(2, first, count), self.values.narrow(2, first, count)
        layer.keys, layer.values = self.shown


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


def new_room(layer: Any) -> Room:
    """Room for more tokens; the layer's tensors stay as they are until `Room.show`.

    Args:
        layer: of a `DynamicCache`, not empty.
    """
    room = _ROOMS[layer] = _made_for(layer.keys, layer.values)
    return room


def _made_for(keys: Tensor, values: Tensor) -> Room:
    count = keys.shape[2]
    capacity = count + max(_LEAST_ROOM, count // 2)
    return Room(_larger(keys, capacity), _larger(values, capacity), count, (keys, values))


def _larger(tensor: Tensor, capacity: int) -> Tensor:
    sequences, heads, count, size = tensor.shape
    larger = torch.empty(sequences, heads, capacity, size, dtype=tensor.dtype, device=tensor.device)
    larger[:, :, :count] = tensor
    return larger
