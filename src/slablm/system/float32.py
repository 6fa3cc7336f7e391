"""Float32 matrix products at the speed the CPU has.

torch multiplies float32 matrices with MKL, which on AMD CPUs does not use AVX-512; oneDNN, which torch carries too,
does (measured on a Zen 5 core: 450 against 205 Gflop/s). torch takes oneDNN as soon as a *lower* internal precision is
allowed. Without AMX there is no such precision, and oneDNN computes in float32 all the same. So allowing it changes
the speed and nothing else; whether that is so here is tried out on a small product, not derived from CPU flags.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch

# float32 sums of 256 products err by about 1e-7, products rounded to bfloat16 by about 2e-3.
_LARGEST_ERROR = 1e-5
_UNCHANGED = ("none", "ieee")
_ONE_AT_A_TIME = Lock()


@contextmanager
def fast_float32() -> Iterator[None]:
    """Let torch use oneDNN for float32 products on the CPU, where that keeps float32's precision.

    A precision that the user has chosen is left alone, and so is everything outside the block.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if before not in _UNCHANGED or not _keeps_precision():
        yield
        return
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _keeps_precision() -> bool:
    """One thread tries it out: a second one would take the first one's setting for the user's, and put that back."""
    with _ONE_AT_A_TIME:
        return _trial()


@cache
def _trial() -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, device="cpu") for shape in ((64, 256), (256, 64)))
    exact = a.double() @ b.double()
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        error = (a @ b - exact).norm() / exact.norm()
    finally:
        matmul.fp32_precision = before
    return bool(error < _LARGEST_ERROR)
