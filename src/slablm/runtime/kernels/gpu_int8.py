"""Int8 rows on NVIDIA GPUs: a kernel in CUDA C++ for a few tokens, compiled for the device when it is first needed.

A head of 8 bits has half the bytes of one in 16 and is read once per token. The text, ``int8_rows.cuh``, says how it is
multiplied. Which launches there are depends on the number of tokens alone, as in `gpu_symbols`.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from slablm.runtime.kernels.gpu_text import TYPES, text_of
from slablm.system import cuda

FEW_TOKENS = 32
# Tokens of one launch, rounded up to one of these.
_TOKENS = (1, 2, 4, 8)
_TEXTS = ("numbers.cuh", "int8_rows.cuh")
_WARPS, _ROWS = 8, 4  # of a block, and of a warp at a time
_CHUNK = 512
# Bytes and columns are read 16 at a time.
_ALIGNMENT = 16
# Of a launch's shared memory, where that leaves any token a launch: several blocks fit on a multiprocessor.
_SHARED_BYTES = 72 << 10
_BLOCKS = 8  # on a multiprocessor, at most


def reads(weight: Tensor, scales: Tensor) -> bool:
    """Whether the kernel has code for int8 rows [m, n] with scales [m]."""
    laid_out = weight.is_contiguous() and scales.is_contiguous() and weight.data_ptr() % _ALIGNMENT == 0
    n = weight.shape[1]
    return laid_out and n > 0 and n % _ALIGNMENT == 0 and _shared(1, n) <= _limits(weight.device)[1]


def linear(inputs: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Up to `FEW_TOKENS` tokens [t, n] → [t, m], in the inputs' dtype.

    Inputs are rounded to 16 bits per 512 columns, and products are summed in integers (relative error 1e-4). A token
    that is not finite comes out as NaN.

    Args:
        inputs: float32, float16 or bfloat16, contiguous, on the weight's device.
        weight: int8 rows that `reads` accepts.
        scales: of them, [m] float16.
    """
    m, n = weight.shape
    outputs = inputs.new_empty(len(inputs), m)
    together = next((t for t in reversed(_TOKENS) if _shared(t, n) <= _SHARED_BYTES), 1)
    for part, output in zip(torch.split(inputs, together), torch.split(outputs, together), strict=True):
        if len(part):
            _launch(part, weight, scales, output)
    return outputs


def _launch(inputs: Tensor, weight: Tensor, scales: Tensor, outputs: Tensor) -> None:
    m, n = weight.shape
    tokens = next(t for t in _TOKENS if t >= len(inputs))
    shared, (processors, room) = _shared(tokens, n), _limits(weight.device)
    blocks = min(-(-m // (_WARPS * _ROWS)), processors * max(1, min(_BLOCKS, room // shared)))
    numbers = map(ctypes.c_int, (m, n, len(inputs), blocks))
    kernel = cuda.kernel(source(inputs.dtype, tokens), "int8_rows", weight.device)
    kernel.launch((blocks,), 32 * _WARPS, (weight, scales, inputs, outputs, *numbers), shared, after=True)


def _shared(tokens: int, n: int) -> int:
    """Bytes of shared memory: of every chunk two for each column, and the unit."""
    return tokens * -(-n // _CHUNK) * (2 * _CHUNK + 4)


@cache
def _limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block of threads can have."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


@cache
def source(dtype: torch.dtype, tokens: int) -> str:
    """The text that is compiled for inputs of a type, and so many tokens."""
    return text_of({"TYPE": TYPES[dtype], "TOKENS": tokens, "WARPS": _WARPS}, _TEXTS)
