"""In which type a tensor is stored: values and factors, and what stays dense.

A float32 model's matrices that stay dense are rounded to the value type before anything is calibrated (`rounded`), so
that saving them in it (`stored_form`) loses nothing: what is measured in memory is what is loaded later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slablm.config import CompressionConfig
from slablm.errors import SlabError


def value_dtype(config: CompressionConfig, model_dtype: torch.dtype) -> torch.dtype:
    """Type of stored values: as configured, else bfloat16 for a bfloat16 model and float16 for all others."""
    if config.value_dtype is not None:
        dtype = getattr(torch, config.value_dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
    return torch.bfloat16 if model_dtype == torch.bfloat16 else torch.float16


def rounded(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A parameter that stays dense, as it will be stored: a float32 matrix is rounded to the value type.

    Args:
        tensor: the parameter.
        name: how errors call it.
        dtype: the value type.

    Returns:
        A tensor of the same type; any other kind of parameter is returned as it is.

    Raises:
        SlabError: a value does not fit into the value type.
    """
    if tensor.dtype != torch.float32 or tensor.ndim < 2:
        return tensor
    result = tensor.to(dtype).float()
    if not torch.isfinite(result).all():
        raise SlabError(f"{name}: a value does not fit into {dtype}: use --value-dtype bfloat16")
    return result


def stored_form(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as it is saved: a float32 matrix in the value type where that loses nothing.

    `rounded` has seen to it that it loses nothing.
    """
    if tensor.dtype != torch.float32 or tensor.ndim < 2:
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.float(), tensor) else tensor
