"""The path of a token: decoder blocks that run as a whole while a model generates.

A block of a small model is a millisecond of products and as much again of small operators around them, each with its
way through Python. For one new token of each of a few sequences the kernels do all of it in one call
(`slablm.runtime.kernels.block`): `use_token_path` gives blocks a forward that takes it where it can, and else is the
forward that the block has. `generate`, servers and chats need not know.

It is taken with no gradients, outside of `torch.compile`, with a `DynamicCache` on the CPU that is not empty, and where
nobody has hooked into the block or replaced a part of it. Its results are those of the block up to rounding.
"""

from __future__ import annotations

import inspect
import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from slablm.runtime import kernels
from slablm.runtime.cache_room import Room, known_room, new_room
from slablm.runtime.decoder_block import DecoderBlock, recognise
from slablm.runtime.kernels import block as kernel

_logger = logging.getLogger(__name__)
# What models pass that changes nothing for one token beside what is used here. Nor does anything that is None or False.
_KNOWN = frozenset(
    ("attention_mask", "cache", "cache_position", "past_key_values", "position_embeddings", "position_ids", "use_cache")
)
# Largest difference to the block itself, relative to what the block adds to the residual stream: rounding of inputs to
# 14 bits, and of results in 16-bit models.
_TOLERANCES = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def use_token_path(model: nn.Module) -> int:
    """Let decoder blocks in symbols run as a whole where they can; each is compared with itself first.

    Args:
        model: a compressed model whose layers run on kernels.

    Returns:
        How many blocks do.
    """
    count = 0
    for layer in model.modules():
        own = vars(layer).get("forward")
        # Where somebody else has given it a forward, as accelerate does, that has to be called.
        block = recognise(layer) if own is None else None
        if block is not None and _agrees(layer, block):
            vars(layer)["forward"] = own = BlockForward(layer, block)
        count += isinstance(own, BlockForward)
    return count


class BlockForward:
    """The forward of a decoder block: the kernels' or its class's own.

    Args:
        layer: the block.
        block: its parts.
    """

    def __init__(self, layer: nn.Module, block: DecoderBlock) -> None:
        self.layer, self.block = layer, block

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the class's."""
        outputs = None
        if not (args or torch.compiler.is_compiling() or torch.is_grad_enabled() or self.layer.training):
            outputs = _step(self.block, hidden_states, kwargs)
        if outputs is None:
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        return outputs


def _step(block: DecoderBlock, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The block for one new token, or None where it has to run itself."""
    rotary = kwargs.get("position_embeddings")
    if rotary is None or not _are_of_one_token(hidden_states, rotary, block.shape) or _asks_for_more(kwargs):
        return None
    cache = kwargs.get("past_key_values") if kwargs.get("cache") is None else kwargs["cache"]
    layer, chosen = _cache_layer(cache, block.index), _kernels()
    description = None if layer is None or chosen is None else block.description()
    if description is None or chosen is None:
        return None
    mask, count = kwargs.get("attention_mask"), layer.keys.shape[2] + 1
    if mask is not None:
        mask = _readable_mask(mask, len(hidden_states), count)
        if mask is None:
            return None
    room = known_room(layer) or _new_room(layer, block.shape)
    if room is None or room.keys.shape[0] != hidden_states.shape[0]:
        return None
    place = kernel.Place(room.keys, room.values, room.slot + 1 - count, room.slot, mask)
    outputs = kernel.run(*chosen, description, hidden_states, rotary, place)
    if outputs is not None:
        if layer.is_sliding:
            layer.cumulative_length += 1
            count = min(count, layer.sliding_window - 1)
        room.show(layer, count)
    return outputs


def _kernels() -> tuple[kernels.Library, str] | None:
    chosen = kernels.backend("cpu")
    return None if chosen.library is None else (chosen.library, chosen.name)


def _asks_for_more(kwargs: dict[str, Any]) -> bool:
    others = kwargs.keys() - _KNOWN
    return any(kwargs[name] is not None and kwargs[name] is not False for name in others)


def _are_of_one_token(hidden_states: Tensor, rotary: tuple[Tensor, Tensor], shape: kernel.BlockShape) -> bool:
    """Whether shapes are [sequences, 1, hidden_size], and [sequences or 1, 1, dimensions that are turned] twice."""
    (sequences, tokens, width), (cosines, sines) = hidden_states.shape, rotary
    if tokens != 1 or sequences > kernel.MAX_SEQUENCES or width != shape.hidden or cosines.shape != sines.shape:
        return False
    turned = cosines.shape[-1]
    if cosines.shape not in ((1, 1, turned), (sequences, 1, turned)) or turned > shape.head_dim:
        return False
    return cosines.dtype == sines.dtype and _is_plain(hidden_states) and _is_plain(cosines) and _is_plain(sines)


def _is_plain(tensor: Tensor) -> bool:
    plain = type(tensor) is Tensor and tensor.is_cpu and tensor.is_contiguous()
    return plain and tensor.dtype in kernel.FLOAT_TYPES


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


def _new_room(layer: Any, shape: kernel.BlockShape) -> Room | None:
    """Room in a layer of a cache, where its tensors are such as the kernels know."""
    keys, values = layer.keys, layer.values
    heads = (keys.shape[1], keys.shape[3]) == (shape.kv_heads, shape.head_dim) and values.shape == keys.shape
    readable = keys.is_cpu and values.is_cpu and keys.dtype == values.dtype and keys.dtype in kernel.FLOAT_TYPES
    return new_room(layer) if heads and readable else None


def _readable_mask(mask: Any, sequences: int, count: int) -> Tensor | None:
    """[sequences or 1, 1, 1, tokens] bool, where True is attention, as the kernels read it; None if it is none such."""
    if type(mask) is not Tensor or mask.dtype != torch.bool or not mask.is_cpu:
        return None
    return mask.contiguous() if mask.shape in ((sequences, 1, 1, count), (1, 1, 1, count)) else None


@torch.no_grad()
def _agrees(layer: nn.Module, block: DecoderBlock) -> bool:
    """Whether the kernels do to random inputs what the block does."""
    weight = next(layer.parameters())
    if not weight.is_cpu or weight.dtype not in _TOLERANCES or block.description() is None or layer.training:
        return False
    generator, shape = torch.Generator().manual_seed(0), block.shape

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cpu").to(weight.dtype)

    inputs, keys = random(1, 1, shape.hidden), random(1, shape.kv_heads, 3, shape.head_dim)
    values, angles = torch.randn_like(keys), random(1, 1, shape.head_dim // 2).repeat(1, 1, 2)
    # The name has changed in transformers 5.2x.
    name = "cache" if "cache" in inspect.signature(type(layer).forward).parameters else "past_key_values"
    ways = (partial(type(layer).forward, layer), lambda states, **kwargs: _step(block, states, kwargs))
    results = []
    for way in ways:
        cache = DynamicCache()
        cache.update(keys, values, block.index)
        outputs = way(inputs, attention_mask=None, position_embeddings=(angles.cos(), angles.sin()), **{name: cache})
        if outputs is None:
            return False
        kept: Any = cache.layers[block.index]
        results.append((outputs - inputs, kept.keys, kept.values))
    differences = [_difference(own, other) for own, other in zip(*results, strict=True)]
    agree = all(difference <= _TOLERANCES[weight.dtype] for difference in differences)  # no NaN does
    if not agree:
        where = f"block {block.index} ({type(layer).__name__})"
        _logger.warning("%s and its kernel differ by %s: it runs without; please report this", where, differences)
    return agree


def _difference(own: Tensor, other: Tensor) -> float:
    return float((own.float() - other.float()).norm() / own.float().norm())
