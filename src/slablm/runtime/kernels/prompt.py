"""A decoder block for many tokens, in two calls of the compiled kernels: before the cache and behind it.

The mathematics is that of `slablm.runtime.kernels.block`. `heads` makes the queries, and the keys and values that go to
the cache, whatever cache it is; `outputs` does the rest with all keys and values that there are.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from slablm.runtime.kernels import native
from slablm.runtime.kernels.block import FLOAT_TYPES, BlockShape

# Sequences, tokens; inputs and their type; cosines, sines, type, dimensions, stride; bits; queries.
_PROMPT = struct.Struct("@2qPq2P3qqP")
# Keys, values, type, strides, length; the mask and its stride.
_CONTEXT = struct.Struct("@2P4qPq")


class Prompt:
    """The tokens of a call.

    Args:
        library: from `native.load`.
        instruction_set: one of `library.batched`.
        block: from `block.describe`.
        shape: of the block.
        inputs: [sequences, tokens, hidden], contiguous.
        rotary: cosines and sines, [sequences or 1, tokens, dimensions that are turned], contiguous.
        bits: 8 or 14, of the inputs of products.
    """

    def __init__(
        self,
        library: native.Library,
        instruction_set: str,
        block: bytes,
        shape: BlockShape,
        inputs: Tensor,
        rotary: tuple[Tensor, Tensor],
        bits: int,
    ) -> None:
        (sequences, tokens, _), (cosines, sines) = inputs.shape, rotary
        self._functions, self._set, self._block = library.functions, native.INSTRUCTION_SETS[instruction_set], block
        self._inputs, self._rotary, self._shape = inputs, rotary, shape
        self._queries = inputs.new_empty((sequences, shape.heads, tokens, shape.head_dim), dtype=torch.float32)
        dimensions = cosines.shape[-1]
        self._prompt = _PROMPT.pack(
            sequences,
            tokens,
            inputs.data_ptr(),
            FLOAT_TYPES[inputs.dtype],
            cosines.data_ptr(),
            sines.data_ptr(),
            FLOAT_TYPES[cosines.dtype],
            dimensions,
            tokens * dimensions if cosines.shape[0] > 1 else 0,
            bits,
            self._queries.data_ptr(),
        )

    def heads(self) -> tuple[Tensor, Tensor] | None:
        """New keys and values, [sequences, kv_heads, tokens, head_dim]; None where something is not finite."""
        (sequences, tokens, _), shape = self._inputs.shape, self._shape
        size = (sequences, shape.kv_heads, tokens, shape.head_dim)
        keys, values = self._inputs.new_empty(size), self._inputs.new_empty(size)
        arguments = self._block, self._prompt, keys.data_ptr(), values.data_ptr()
        status = self._functions.slablm_prompt_heads(self._set, *arguments, torch.get_num_threads())
        return (keys, values) if native.ran(status) else None

    def outputs(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor | None:
        """What the block returns, after `heads`.

        Args:
            keys: [sequences, kv_heads, length, head_dim], heads without gaps.
            values: likewise, with the same strides.
            mask: [sequences or 1, 1, tokens, length] bool, contiguous; None if there are no other tokens than those of
                this call, each of which sees those up to itself.

        Returns:
            [sequences, tokens, hidden]; None where something is not finite.
        """
        outputs = torch.empty_like(self._inputs)
        context = _CONTEXT.pack(
            keys.data_ptr(),
            values.data_ptr(),
            FLOAT_TYPES[keys.dtype],
            keys.stride(0),
            keys.stride(1),
            keys.shape[2],
            0 if mask is None else mask.data_ptr(),
            0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
        )
        arguments = self._block, self._prompt, context, outputs.data_ptr()
        status = self._functions.slablm_prompt_outputs(self._set, *arguments, torch.get_num_threads())
        return outputs if native.ran(status) else None
