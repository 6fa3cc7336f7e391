"""Coordinate descent over the columns of an approximation that is there already.

The output error of one row, (w − ŵ) H (w − ŵ)ᵀ, is a parabola in each ŵ_j. With all others as they are, its minimum is

    t_j = ŵ_j + [(w − ŵ) H]_j / H_jj

and any other value q costs H_jj (q − t_j)² more. So of the values an entry may have, the one next to t_j is best. Going
through the columns, all rows at once, never raises the error as long as each entry takes its best value; unlike the
sweep with error feedback (`sweep`), in which a column is fixed for good when its turn comes, every entry is looked at
with all others known. It needs no factor of H, and it needs a good start, which that sweep gives.

When column j changes by −δ, t of another column l changes by δ H_jl / H_ll, and its own not at all. As in `sweep`, that
is applied at once to the rest of a block of columns, and to all columns behind it by one matrix product.

The caller's plan is the same as there: in a `Block`, `weight` is t, `before` is Ŵ, and `diagonal` 1 / √H_jj, so that
(difference / diagonal)² is what a difference to t costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slablm.methods.sweep import BLOCK_SIZE, Block, Plan


def descent_sweep(
    residual: Tensor, approximation: Tensor, gram: Tensor, plan: Plan, block_size: int = BLOCK_SIZE
) -> Tensor:
    """Replace column after column, each seeing what became of those before.

    Args:
        residual: (W − Ŵ) H, [m, n] float32.
        approximation: Ŵ to start from, [m, n] float32.
        gram: H, [n, n] float32, positive on the diagonal.
        plan: see `slablm.methods.sweep.column_sweep`.
        block_size: columns per block.

    Returns:
        The new approximation, [m, n] float32.
    """
    # Transposed, a column is contiguous. clone: the caller's tensors must survive, also where .T is a plain view.
    columns, pull = (part.T.clone(memory_format=torch.contiguous_format) for part in (approximation, residual))
    diagonal = gram.diagonal()
    for start in range(0, len(columns), block_size):
        stop = min(start + block_size, len(columns))
        current = pull[start:stop].div_(diagonal[start:stop, None]).add_(columns[start:stop])
        coupling = gram[start:stop, start:stop] / diagonal[start:stop, None]
        ones = torch.ones_like(diagonal[start:stop])
        cost = diagonal[start:stop].rsqrt()
        block = Block(current.T, cost, start, -coupling.T, ones, columns[start:stop])
        columns[start:stop], changes = plan(block)
        pull[stop:].addmm_(gram[stop:, start:stop], changes)
    return columns.T.contiguous()
