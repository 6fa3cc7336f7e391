"""The mathematics: tensors in, a `Decomposition` out. Nothing here knows of transformers, files or devices.

A method is a function ``(weight, stats, config) -> Decomposition``; `METHODS` names them all.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods.decomposition import Decomposition, LayerStats
from slablm.methods.pruning import magnitude, wanda
from slablm.methods.slab import slab

Method = Callable[[Tensor, LayerStats, CompressionConfig], Decomposition]

METHODS: dict[str, Method] = {"slab": slab, "wanda": wanda, "magnitude": magnitude}

# Methods that need `LayerStats.gram`, XᵀX.
NEEDS_GRAM: frozenset[str] = frozenset()

__all__ = ["METHODS", "NEEDS_GRAM", "Decomposition", "LayerStats", "Method", "get_method"]


def get_method(name: str) -> Method:
    """Look a method up.

    Raises:
        SlabError: there is none of that name.
    """
    if name not in METHODS:
        raise SlabError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]
