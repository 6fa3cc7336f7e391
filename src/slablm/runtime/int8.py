"""Embedding and head in 8 bits: int8 rows, each with one FP16 scale.

    ŵ_ij = s_i q_ij,    q ∈ {−127 … 127}

They run as they are stored (FORMAT.md). The embedding widens the rows it looks up; the head multiplies int8 numbers,
accumulates in float32, and multiplies by the scale in the end. Both matrices are parameters, without gradient, as
transformers ties and accelerate moves those; where the two share one matrix, they share its scales as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from slablm.errors import SlabError
from slablm.packing.quantize import quantize_rows
from slablm.runtime import kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers' embeddings that are nn.Embedding times `embed_scale`.
_SCALED = ("GemmaTextScaledWordEmbedding", "Gemma2TextScaledWordEmbedding", "Gemma3TextScaledWordEmbedding")
_WAY_OUT = "use --head-bits 16"


class Int8Rows(nn.Module):
    """Holds the int8 rows and knows the type to compute in.

    Args:
        weight: [m, n] int8.
        scales: [m] float16.
        dtype: type of the computation; follows ``model.to(dtype)``, weight and scales never do.
    """

    weight: nn.Parameter
    scales: nn.Parameter
    like: Tensor

    def __init__(self, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.scales = nn.Parameter(weight, requires_grad=False), nn.Parameter(scales, requires_grad=False)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Rows:
        """Move the scales, never cast them."""
        scales = self.scales

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor is not scales or moved.dtype == tensor.dtype:
                return moved
            return tensor if moved.device == tensor.device else tensor.to(moved.device)

        super()._apply(move_only, recurse)  # type: ignore[no-untyped-call]
        return self


class Int8Embedding(Int8Rows):
    """`torch.nn.Embedding` over int8 rows; its outputs have the computation's type.

    Args:
        weight: [num_embeddings, embedding_dim] int8.
        scales: [num_embeddings] float16.
        padding_idx: as in `torch.nn.Embedding`.
        dtype: type of the computation.
        embed_scale: what its outputs are multiplied by, in their type; None for nothing.
    """

    def __init__(
        self, weight: Tensor, scales: Tensor, padding_idx: int | None, dtype: torch.dtype, embed_scale: float | None
    ) -> None:
        super().__init__(weight, scales, dtype)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.embed_scale = padding_idx, embed_scale

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [...] → [..., hidden_size]."""
        rows = functional.embedding(tokens, self.weight).float() * self.scales[tokens].float()[..., None]
        outputs = rows.to(self.like.dtype)
        # In transformers' class the factor is a tensor that is rounded to the weight's type.
        return outputs if self.embed_scale is None else outputs * outputs.new_tensor(self.embed_scale)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        scaled = "" if self.embed_scale is None else f", embed_scale={self.embed_scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}{scaled}, stored=int8"


class Int8Linear(Int8Rows):
    """`torch.nn.Linear` over int8 rows.

    Args:
        weight: [m, n] int8.
        scales: [m] float16.
        bias: [m] or None.
        dtype: type of the computation.
    """

    def __init__(self, weight: Tensor, scales: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(weight, scales, dtype)
        self.out_features, self.in_features = weight.shape
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., n] → [..., m], in the inputs' dtype."""
        outputs = kernels.dense_linear(inputs, self.weight, self.scales)
        return outputs if self.bias is None else outputs + self.bias.to(inputs.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, stored=int8"


def head_and_embedding(model: PreTrainedModel) -> list[str]:
    """Full names of the embedding, the head and whatever shares a matrix with them.

    Args:
        model: a causal language model, dense.

    Raises:
        SlabError: one of them can only be stored in 16 bits; the message names it.
    """
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    ends = [model.get_input_embeddings(), *([] if head is None else [head])]
    weights = [getattr(end, "weight", None) for end in ends]
    names = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if any(module is end for end in ends) or (weight is not None and any(weight is other for other in weights)):
            _check_kind(name, module)
            names.append(name)
    return names


def int8_names(model: nn.Module) -> list[str]:
    """Full names of the modules of int8 rows, in alphabetical order."""
    return sorted(name for name, module in model.named_modules() if isinstance(module, Int8Rows))


def use_int8(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Replace embeddings and linear layers by such of int8 rows, in place; tied ones stay tied.

    Args:
        model: on the meta device only shapes are made, to be filled.
        names: full names; all modules that share a matrix.

    Raises:
        SlabError: a module can only be stored in 16 bits, or a value is too large.
    """
    made: dict[int, Int8Rows] = {}
    for name in names:
        module = model.get_submodule(name)
        _check_kind(name, module)
        dense = module.weight
        assert isinstance(dense, nn.Parameter)
        first = made.get(id(dense))
        parts = quantize_rows(dense, name) if first is None else (first.weight.data, first.scales.data)
        own = _int8(module, *parts, dense.dtype)
        if first is None:
            made[id(dense)] = own
        else:
            own.weight, own.scales = first.weight, first.scales
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, own)
    _tie_scales(model)


def _int8(module: nn.Module, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Int8Rows:
    if isinstance(module, nn.Linear):
        return Int8Linear(weight, scales, module.bias, dtype)
    assert isinstance(module, nn.Embedding)
    # On the meta device `embed_scale` itself has no value.
    scale: float | None = getattr(module, "scalar_embed_scale", None)
    return Int8Embedding(weight, scales, module.padding_idx, dtype, scale)


def _check_kind(name: str, module: nn.Module) -> None:
    kind = type(module)
    plain = kind in (nn.Embedding, nn.Linear)
    scaled = kind.__name__ in _SCALED and isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale")
    if not (plain or scaled):
        raise SlabError(
            f"{name} is a {kind.__name__}, no plain nn.Embedding or nn.Linear, and stays in 16 bits: {_WAY_OUT}"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:  # renormalises its weight in every forward
        raise SlabError(f"{name} has max_norm={module.max_norm:g} and stays in 16 bits: {_WAY_OUT}")


def _tie_scales(model: PreTrainedModel) -> None:
    """Let transformers tie scales where it ties matrices: while loading, saving, and in `tie_weights`."""

    def with_scales(tied: dict[str, str]) -> dict[str, str]:
        scales = {
            _scales_of(target): _scales_of(source)
            for target, source in tied.items()
            if all(_is_int8(model, name) for name in (target, source))
        }
        return tied | scales

    declared = model._tied_weights_keys
    if isinstance(declared, dict):
        vars(model)["_tied_weights_keys"] = with_scales(declared)
    model.all_tied_weights_keys = with_scales(model.all_tied_weights_keys)


def _scales_of(weight: str) -> str:
    return weight.removesuffix("weight") + "scales"


def _is_int8(model: nn.Module, weight: str) -> bool:
    name, _, leaf = weight.rpartition(".")
    modules = dict(model.named_modules())
    return leaf == "weight" and isinstance(modules.get(name), Int8Rows)
