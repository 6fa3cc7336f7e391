"""Swapping modules of a model for others."""

from __future__ import annotations

import torch
from torch import nn

from slablm.runtime.linear import SlabLinear


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the module called `name` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def unpack_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every `SlabLinear` of a model a dense layer of the same numbers, in place.

    For measuring: to unpack each layer anew for each of thousands of short texts would take hours.

    Args:
        model: the model.
        dtype: as for `SlabLinear.unpacked`.

    Raises:
        SlabError: values were quantized to 8 bits.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SlabLinear):
            replace_module(model, name, layer.unpacked(dtype))
