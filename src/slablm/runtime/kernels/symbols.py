"""Weights in symbols: the reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from slablm.packing import PackedSymbols


def linear(inputs: Tensor, weight: PackedSymbols) -> Tensor:
    """Ŵ applied to [..., n] → [..., m], in the inputs' dtype."""
    return functional.linear(inputs, weight.dense().to(inputs.dtype))
