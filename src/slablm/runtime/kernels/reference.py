"""The truth in plain torch: what every kernel is compared with, and what runs where no kernel can.

y = Ŵ x,    Ŵ = s_i q (or the stored value) where kept, ±Σ_q u_q v_q elsewhere
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from slablm.methods.decomposition import low_rank
from slablm.runtime.kernels.runtime_weight import RuntimeWeight


def unpack(weight: RuntimeWeight, begin: int = 0, end: int | None = None) -> Tensor:
    """Rows begin … end of Ŵ, [end − begin, n] float32.

    Args:
        weight: in one of the runtime layouts.
        begin: first row.
        end: row after the last, by default all rows.
    """
    end = weight.out_features if end is None else end
    kept, minus = weight.masks(begin, end)
    dense = low_rank(weight.left[begin:end], weight.right[:, : weight.in_features])
    if minus is not None:
        dense = torch.where(minus, -dense, dense)
    values = weight.rows[begin:end].float()
    if weight.scales is not None:
        values = values * weight.scales[begin:end, None]
    return dense.masked_scatter_(kept, values)


def linear(inputs: Tensor, weight: RuntimeWeight) -> Tensor:
    """Ŵ applied to [..., n] → [..., m], in the inputs' dtype; differentiable in the inputs."""
    return functional.linear(inputs, unpack(weight).to(inputs.dtype))
