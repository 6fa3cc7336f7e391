"""A decoder block for many tokens: on the kernels up to its cache, and behind it.

The cache is transformers' own `DynamicCache`, which is given the new keys and values as the block would; or none. Where
the kernels find after that that something is not finite, the cache is made what it was, and the block runs itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from slablm.runtime import kernels
from slablm.runtime.block_given import Given, are_readable
from slablm.runtime.decoder_block import DecoderBlock
from slablm.runtime.kernels.backends import activation_bits
from slablm.runtime.kernels.prompt import Prompt

# For fewer tokens than that, in all sequences, the layers have a faster path.
_FEWEST = 16


def read(block: DecoderBlock, description: bytes, hidden_states: Tensor, given: Given) -> Tensor | None:
    """Run a block.

    Args:
        block: the block.
        description: of its present state.
        hidden_states: [sequences, tokens, hidden].
        given: what else it is called with.

    Returns:
        As its inputs, with the new keys and values in the cache; None where the block has to run itself.
    """
    chosen = kernels.backend("cpu")
    sequences, tokens = hidden_states.shape[:2]
    if chosen.library is None or chosen.name not in chosen.library.batched or sequences * tokens < _FEWEST:
        return None
    if not block.sees_the_past or not given.suits(hidden_states, block.shape):
        return None
    if given.cache is not None and type(given.cache) is not DynamicCache:
        return None
    known = _known_tokens(given.cache, block.index)
    if not given.has_readable_mask(sequences, tokens, known + tokens) or (given.mask is None and known > 0):
        return None
    prompt = Prompt(
        chosen.library, chosen.name, description, block.shape, hidden_states, given.rotary, activation_bits()
    )
    new = prompt.heads()
    if new is None:
        return None
    before = _state(given.cache, block.index)
    keys, values = new if given.cache is None else given.cache.update(*new, block.index)
    size = (sequences, block.shape.kv_heads, known + tokens, block.shape.head_dim)
    outputs = None
    if keys.shape == size and are_readable(keys, values):
        outputs = prompt.outputs(keys.contiguous(), values.contiguous(), given.contiguous_mask())
    if outputs is None and given.cache is not None:
        _restore(given.cache, block.index, before)
    return outputs


def _known_tokens(cache: Any, index: int) -> int:
    """Tokens that attention sees before the new ones."""
    layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
    return 0 if layer is None or not layer.is_initialized else int(layer.keys.shape[2])


def _state(cache: Any, index: int) -> dict[str, Any] | None:
    """What the layer of a cache has; None if there is none."""
    return dict(vars(cache.layers[index])) if cache is not None and index < len(cache.layers) else None


def _restore(cache: Any, index: int, state: dict[str, Any] | None) -> None:
    if state is None:
        del cache.layers[index:]
        return
    vars(cache.layers[index]).clear()
    vars(cache.layers[index]).update(state)
