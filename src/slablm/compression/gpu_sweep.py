"""The CUDA form of `slablm.methods.nearest_columns`: a block of a sweep in one launch.

`nearest_columns.cu` beside this file says how. To import this module is to register it. Without NVRTC columns are
replaced one after the other, in plain torch.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slablm.methods.nearest_columns import nearest_columns, plain_nearest_columns
from slablm.system import cuda

SOURCE = Path(__file__).with_name("nearest_columns.cu")
NAME = "nearest_columns"
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
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("fresh", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("level_count", ctypes.c_int),
    ]


@nearest_columns.register_kernel("cuda")
def nearest_columns_on_gpu(current: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of `plain_nearest_columns`."""
    given: Any = (current, *others)
    if cuda.missing() is not None:
        return plain_nearest_columns(*given)
    columns, rows = current.shape
    fresh, errors = (torch.empty(columns, rows, device=current.device) for _ in range(2))
    tensors = [part if part is None else part.contiguous() for part in (*given, fresh, errors)]
    block = Block(*(None if part is None else part.data_ptr() for part in tensors), rows, columns, len(given[-1]))
    with torch.cuda.device(current.device):
        kernel = cuda.kernel(_source(), NAME, current.device)
        kernel.launch((-(-rows // _THREADS),), _THREADS, [block], _shared(columns))
    return fresh, errors


def _shared(columns: int) -> int:
    """Bytes of shared memory: the coefficients of the last piece."""
    return -(-columns // _PIECE) * _PIECE * _PIECE * _FLOAT_BYTES


@cache
def _source() -> str:
    return SOURCE.read_text(encoding="utf-8")
