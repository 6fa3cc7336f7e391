"""A dense model made ready: what cannot be compressed is refused, and what stays dense is rounded as it is stored."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from slablm.calibration.pairwise import LEAVES
from slablm.checkpoint.stored import rounded, value_dtype
from slablm.config import CompressionConfig
from slablm.dense.targets import Targets
from slablm.errors import SlabError
from slablm.methods import get_method
from slablm.runtime.int8 import head_and_embedding, use_int8
from slablm.runtime.linear import SlabLinear
from slablm.system.finite import check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare_model(model: PreTrainedModel, targets: Targets, config: CompressionConfig) -> CompressionConfig:
    """Check a dense model, and round what stays dense as it would be stored; in place.

    Args:
        model: the dense model.
        targets: from `select_targets`.
        config: settings.

    Returns:
        The settings with the value type filled in.

    Raises:
        SlabError: the model is compressed already; NaN or Inf in weights; a value that the value type cannot hold; see
            `use_head_bits`.
    """
    check_model(model)
    _check_parameters(model)
    use_head_bits(model, config)
    config = with_value_dtype(config, model)
    _round_other_matrices(model, targets, getattr(torch, config.value_dtype or ""))
    return config


def with_value_dtype(config: CompressionConfig, model: PreTrainedModel) -> CompressionConfig:
    """The settings with the value type filled in."""
    return replace(config, value_dtype=str(value_dtype(config, model.dtype)).removeprefix("torch."))


def use_head_bits(model: PreTrainedModel, config: CompressionConfig) -> None:
    """Put embedding and head into int8 rows if the settings say so, in place.

    Args:
        model: the dense model; on the meta device it gets empty ones.
        config: settings.

    Raises:
        SlabError: one of them can only be stored in 16 bits.
    """
    if config.head_bits == 8:
        use_int8(model, head_and_embedding(model))


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model that is compressed or quantized already.

    Raises:
        SlabError: with the way out.
    """
    if any(isinstance(module, SlabLinear) for module in model.modules()):
        raise SlabError("the model is already compressed by slablm: start from the dense model")
    if getattr(model.config, "quantization_config", None) is not None:
        raise SlabError("the model is already quantized: start from the unquantized model")


def check_ranks(config: CompressionConfig, ranks: int) -> None:
    """Refuse more processes than windows can be divided among.

    Raises:
        SlabError: there are too many.
    """
    if ranks > LEAVES:
        raise SlabError(f"windows are divided among {LEAVES} ranks at most, not among {ranks}: use fewer")
    if config.num_samples < ranks:
        raise SlabError(
            f"{config.num_samples} calibration windows cannot be divided among {ranks} ranks: "
            f"use --num-samples {ranks} or more, or fewer ranks"
        )


def check_packable(method: str) -> None:
    """Refuse methods whose result cannot be saved.

    Raises:
        SlabError: an unknown method, or one that is only there to be compared with.
    """
    if not get_method(method).packable:
        raise SlabError(f"method {method!r} has no packed format, it is a yardstick: see it in `slablm compare`")


def _check_parameters(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        check_finite(parameter, name)


def _round_other_matrices(model: PreTrainedModel, targets: Targets, dtype: torch.dtype) -> None:
    compressed = {f"{name}.weight" for names in targets.names for name in names}
    for name, parameter in model.named_parameters():
        if name not in compressed:
            parameter.data = rounded(parameter.data, name, dtype)
