"""A block of columns in a sweep (`sweep`, `descent`), each entry of which becomes the nearest value of an alphabet.

One column comes after the other, with a few steps of arithmetic each: on a GPU, most of the time would go into starting
them. So a block is one operator. What is here is plain torch, and says what the result is; a device may have another
implementation registered, which may choose otherwise where two values are all but equally near.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slablm.methods.alphabet import nearest_level
from slablm.methods.sweep import fed_forward


def plain_nearest_columns(
    current: Tensor,
    before: Tensor | None,
    coefficients: Tensor,
    divisors: Tensor,
    left: Tensor,
    right: Tensor,
    scales: Tensor,
    groups: Tensor,
    levels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Replace the columns of a block one after the other; all float32 except `groups`.

    Args:
        current: `weight` of the `Block`, transposed, [b, m].
        before: of the `Block`, [b, m] or None.
        coefficients: of the `Block`, [b, b].
        divisors: of the `Block`, [b].
        left: u, [m].
        right: v of these columns, [b].
        scales: s of all groups, transposed, [G, m].
        groups: the group of each of these columns, [b] int64.
        levels: a, ascending, [L].

    Returns:
        The new columns, and their errors, both [b, m].
    """
    current = current.clone()
    backgrounds, wide_scales = torch.outer(right, left), scales[groups]

    def replace(j: int) -> Tensor:
        keep, _, kept = nearest_level(current[j].abs(), backgrounds[j], wide_scales[j], levels)
        return torch.where(keep, kept, backgrounds[j]).copysign_(current[j])

    return fed_forward(current, before, coefficients, divisors, replace)


nearest_columns = torch.library.custom_op("slablm::nearest_columns", plain_nearest_columns, mutates_args=())
