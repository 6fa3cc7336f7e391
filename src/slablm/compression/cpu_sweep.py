"""The CPU forms of operators of `slab+`; to import this module is to register them.

- `slablm.methods.trellis.trellis_columns`: a block of a sweep in one call of the compiled kernels; `csrc/trellis.h`
  says how. Where the reference runs (`runtime.kernels.backend`) and for other numbers than float32, columns are
  replaced one after the other, in plain torch.
- `slablm.methods.symbols_fit.symbol_sums`: one pass over the entries, each added where its symbol leads. On the CPU one
  row comes in one order, however many threads there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slablm.methods.symbols_fit import symbol_sums
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


@symbol_sums.register_kernel("cpu")
def symbol_sums_on_cpu(signed: Tensor, importance: Tensor, codes: Tensor, symbols: int) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of `plain_symbol_sums`."""
    places = codes.long()
    products, shares = (signed.new_zeros(len(signed), symbols) for _ in range(2))
    products.scatter_add_(1, places, signed * importance)
    shares.scatter_add_(1, places, importance.expand_as(signed))
    return products, shares
