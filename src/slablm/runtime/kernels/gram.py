"""XᵀX of bfloat16 inputs, summed in float32, on a CPU that multiplies such numbers (AVX512-BF16): `csrc/gram.cpp`.

torch has no such product: it rounds what bfloat16 matrices give to bfloat16, or wants them in float32, which takes
twice as long.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from slablm.runtime.kernels import native
from slablm.runtime.kernels.backends import backend

_NO_KERNEL = 2  # `kNoKernel`


def gram_kernel(rows: Tensor) -> Callable[[Tensor, Tensor], None] | None:
    """What adds XᵀX to a Gram matrix, with arguments as `add_gram` after the first two; None where nothing does.

    Args:
        rows: X. Those of fake tensors, which have no numbers, are never added.
    """
    if rows.dtype != torch.bfloat16 or not rows.is_cpu or type(rows) is not Tensor:
        return None
    chosen = backend()
    if chosen.library is None:
        return None
    nothing = (None, 0, 1, None, 1)
    status = chosen.library.functions.slablm_add_gram(native.INSTRUCTION_SETS[chosen.name], *nothing)
    return None if status == _NO_KERNEL else partial(add_gram, chosen.library, chosen.name)


def add_gram(library: native.Library, instruction_set: str, gram: Tensor, rows: Tensor) -> None:
    """Add XᵀX where it is not below the diagonal; next to the diagonal it may be, too.

    The sums are the same bits for any number of threads. Numbers below 2⁻¹²⁶ count as 0.

    Args:
        library: from `native.load`.
        instruction_set: one that has a kernel.
        gram: [n, n], contiguous float32.
        rows: X, [tokens, n] bfloat16.
    """
    tokens, n = rows.shape
    given = rows.is_cpu and rows.dtype == torch.bfloat16
    if not given or not gram.is_cpu or gram.dtype != torch.float32 or not gram.is_contiguous() or gram.shape != (n, n):
        raise RuntimeError(
            f"a kernel needs bfloat16 inputs and a contiguous float32 matrix [{n}, {n}] on the CPU, got {rows.dtype} "
            f"on {rows.device} and {gram.dtype} {list(gram.shape)} on {gram.device}; this is a bug in slablm"
        )
    rows = rows.contiguous()
    status = library.functions.slablm_add_gram(
        native.INSTRUCTION_SETS[instruction_set],
        rows.data_ptr(),
        tokens,
        n,
        gram.data_ptr(),
        torch.get_num_threads(),
    )
    native.ran(status)
