"""The CPU form of `slablm.methods.trellis.trellis_columns`: a block of a sweep in one call of the compiled kernels.

`csrc/trellis.h` says how. To import this module is to register it. Where the reference runs (`runtime.kernels.backend`)
and for other numbers than float32, columns are replaced one after the other, in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slablm.methods.trellis import plain_trellis_columns, trellis_columns
from slablm.runtime.kernels import backend, native


@trellis_columns.register_kernel("cpu")
def trellis_columns_on_cpu(current: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results are those of `plain_trellis_columns`."""
    given: Any = (current, *others)
    chosen = backend()
    if chosen.library is None or any(part is not None and part.dtype != torch.float32 for part in given):
        return plain_trellis_columns(*given)
    return native.trellis_columns(chosen.library, chosen.name, *given)
