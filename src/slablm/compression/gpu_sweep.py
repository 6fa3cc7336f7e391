"""The CUDA form of `slablm.methods.trellis.trellis_columns`: a block of a sweep in one launch.

`trellis_columns.cu` beside this file says how. To import this module is to register it. Without NVRTC columns are
replaced one after the other, in plain torch.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slablm.methods.trellis import plain_trellis_columns, trellis_columns
from slablm.system import cuda

NAME = "trellis_columns"
# Few: a weight has some thousand rows, and there are more than a hundred multiprocessors to keep busy.
_THREADS = 64
# As in the text.
_PIECE = 16
_FLOAT_BYTES = 4


class Block(ctypes.Structure):
    """`Block` of the text: addresses of contiguous tensors, and numbers."""

    _fields_ = [
        ("current", ctypes.c_void_p),
        ("before", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("divisors", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("fresh", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
        ("rows", ctypes.c_longlong),
        ("columns", ctypes.c_int),
    ]


@trellis_columns.register_kernel("cuda")
def trellis_columns_on_gpu(current: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results are those of `plain_trellis_columns`."""
    given: Any = (current, *others)
    if cuda.missing() is not None:
        return plain_trellis_columns(*given)
    columns, rows = current.shape
    types = torch.uint8, torch.float32, torch.float32
    codes, fresh, errors = (torch.empty(columns, rows, dtype=dtype, device=current.device) for dtype in types)
    tensors = [part if part is None else part.contiguous() for part in (*given, codes, fresh, errors)]
    block = Block(*(None if part is None else part.data_ptr() for part in tensors), rows, columns)
    bits = len(given[-1]).bit_length() - 1
    with torch.cuda.device(current.device):
        kernel = cuda.kernel(source(bits), NAME, current.device)
        kernel.launch((-(-rows // _THREADS),), _THREADS, [block], _shared(columns))
    return codes, fresh, errors


def _shared(columns: int) -> int:
    """Bytes of shared memory: the coefficients of the last piece."""
    return -(-columns // _PIECE) * _PIECE * _PIECE * _FLOAT_BYTES


@cache
def source(bits: int) -> str:
    """The text for symbols of so many bits."""
    text = Path(__file__).with_name("trellis_columns.cu").read_text(encoding="utf-8")
    return f"#define BITS {bits}\n{text}"
