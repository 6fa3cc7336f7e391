"""The path of a token: decoder blocks that run as a whole while a model generates.

A block of a small model is a millisecond of products and as much again of small operators around them, each with its
way through Python. For one new token of each of a few sequences the kernels do all of it, and all blocks that follow
each other in one call (`slablm.runtime.block_run`); for a prompt they do all but the cache's own work
(`slablm.runtime.block_prompt`). `use_token_path` gives blocks a forward that takes this path where it can, and else is
the forward that the block has. `generate`, servers and chats need not know.

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
from transformers.cache_utils import DynamicCache

from slablm.runtime.block_run import BlockRuns
from slablm.runtime.decoder_block import DecoderBlock, Watch, recognise

_logger = logging.getLogger(__name__)
# A block is compared with itself on a prompt and one new token.
_TOKENS = 20
# Largest difference, relative to what the block adds to the residual stream: rounding of inputs to 14 bits, and of
# results in 16-bit models. On top comes rounding of the stream, which counts where a block adds next to nothing.
_TOLERANCES = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def use_token_path(model: nn.Module) -> int:
    """Let decoder blocks in symbols run as a whole where they can; each is compared with itself first.

    Args:
        model: a compressed model whose layers run on kernels.

    Returns:
        How many blocks do.
    """
    count, runs = 0, BlockRuns()
    for layer in model.modules():
        own = vars(layer).get("forward")
        # Where somebody else has given it a forward, as accelerate does, that has to be called.
        block = recognise(layer) if own is None else None
        if block is not None and _agrees(layer, block):
            vars(layer)["forward"] = own = BlockForward(layer, runs, runs.add(layer, block))
        count += isinstance(own, BlockForward)
    return count


class BlockForward:
    """The forward of a decoder block: the kernels' or its class's own.

    Args:
        layer: the block.
        runs: of the blocks of the model.
        index: of the block among them.
    """

    def __init__(self, layer: nn.Module, runs: BlockRuns, index: int) -> None:
        self.layer, self.runs, self.index = layer, runs, index

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the class's."""
        outputs = None
        if not (args or torch.compiler.is_compiling() or torch.is_grad_enabled() or self.layer.training):
            outputs = self.runs.step(self.index, hidden_states, kwargs)
        if outputs is None:
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        return outputs


@torch.no_grad()
def _agrees(layer: nn.Module, block: DecoderBlock) -> bool:
    """Whether the kernels do to random inputs what the block does."""
    weight = next(layer.parameters())
    if not weight.is_cpu or weight.dtype not in _TOLERANCES or Watch([block]).description() is None or layer.training:
        return False
    generator, shape, runs = torch.Generator().manual_seed(0), block.shape, BlockRuns()
    runs.add(layer, block)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cpu").to(weight.dtype)

    # The name has changed in transformers 5.2x.
    name = "cache" if "cache" in inspect.signature(type(layer).forward).parameters else "past_key_values"
    ways: tuple[Any, Any] = (partial(type(layer).forward, layer), lambda states, **kwargs: runs.step(0, states, kwargs))
    results: list[list[Tensor]] = [[], []]
    angles = random(1, _TOKENS, shape.head_dim // 2).repeat(1, 1, 2)
    inputs = random(1, _TOKENS, shape.hidden)
    parts = slice(None, -1), slice(-1, None)  # a prompt, and a new token
    for way, made in zip(ways, results, strict=True):
        cache = DynamicCache()
        for part in parts:
            given, turns = inputs[:, part].contiguous(), angles[:, part].contiguous()
            kwargs: dict[str, Any] = {
                "attention_mask": None,
                "position_embeddings": (turns.cos(), turns.sin()),
                name: cache,
            }
            outputs = way(given, **kwargs)
            if outputs is None and part.stop is None:
                return False
            made.append((ways[0](given, **kwargs) if outputs is None else outputs) - given)
        kept: Any = cache.layers[block.index]
        made += [kept.keys, kept.values]
    eps = torch.finfo(weight.dtype).eps
    rounding = [eps * float(inputs[:, part].float().norm()) for part in parts] + 2 * [0.0]  # none of keys and values
    differences = [_difference(*compared) for compared in zip(*results, rounding, strict=True)]
    agree = all(difference <= _TOLERANCES[weight.dtype] for difference in differences)  # no NaN does
    if not agree:
        where = f"block {block.index} ({type(layer).__name__})"
        _logger.warning("%s and its kernel differ by %s: it runs without; please report this", where, differences)
    return agree


def _difference(own: Tensor, other: Tensor, rounding: float) -> float:
    distance = (own.float() - other.float()).norm() - rounding
    return float(distance.clamp(min=0) / own.float().norm().clamp(min=torch.finfo(torch.float32).tiny))
