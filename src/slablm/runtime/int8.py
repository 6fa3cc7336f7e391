"""Embedding and head in 8 bits: int8 rows, each with one FP16 scale.

    ŵ_ij = s_i q_ij,    q ∈ {−127 … 127}

They run as they are stored (FORMAT.md). The embedding widens the rows it looks up; the head multiplies int8 numbers,
accumulates in float32, and multiplies by the scale in the end. The matrix is a parameter, without gradient, as
transformers ties and accelerate moves those. Scales are a buffer: the first parameter of a float type is taken for the
type of the model. Where embedding and head share a matrix, they share its scales as well.
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
    scales: Tensor
    like: Tensor

    def __init__(self, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scales", scales)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Rows:
        """Move the scales, never cast them; one tensor in two modules stays one, as a parameter does."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved, self.scales = self.scales, scales
        if moved.device != scales.device:
            moved = moved if moved.dtype == scales.dtype else scales.to(moved.device)
            if torch._has_compatible_shallow_copy_type(scales, moved):
                scales.data = moved
            else:
                self.scales = moved
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
        outputs = rows_of(self.weight, self.scales, tokens).to(self.like.dtype)
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


def rows_of(weight: Tensor, scales: Tensor, tokens: Tensor) -> Tensor:
    """The rows of tokens, widened.

    Args:
        weight: [m, n] int8.
        scales: [m] float16.
        tokens: ids [...].

    Returns:
        [..., n] float32.
    """
    return functional.embedding(tokens, weight).float() * scales[tokens].float()[..., None]


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
        parts = quantize_rows(dense, name) if first is None else (first.weight, first.scales)
        own = _int8(module, *parts, dense.dtype).train(module.training)
        if first is None:
            made[id(dense)] = own
        else:
            own.weight = first.weight
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, own)
    tie_scales(model)


def tie_scales(model: PreTrainedModel) -> None:
    """Let tied int8 rows have one tensor of scales, now and whenever transformers ties or saves.

    Args:
        model: of tied int8 rows at least one has scales.

    Raises:
        SlabError: rows without scales are tied to none that have some.
    """
    rows = {name: module for name, module in model.named_modules() if isinstance(module, Int8Rows)}
    if not rows:
        return
    scales = {}
    for pair in model.all_tied_weights_keys.items():
        target, source = (tensor.rpartition(".")[0] for tensor in pair)
        if target in rows and source in rows:
            scales[f"{target}.scales"] = f"{source}.scales"
            given = rows[target].scales if rows[source].scales is None else rows[source].scales
            rows[target].scales = rows[source].scales = given
    for name, module in rows.items():
        if module.scales is None:
            raise SlabError(f"{name} has no scales of its own: load the model with tie_word_embeddings as it was saved")
    vars(model)["_tied_weights_keys"] = (model._tied_weights_keys or {}) | scales


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
            f"{name} has class {kind.__name__}, no plain nn.Embedding or nn.Linear, and stays in 16 bits: {_WAY_OUT}"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:  # renormalises its weight in every forward
        raise SlabError(f"{name} has max_norm={module.max_norm:g} and stays in 16 bits: {_WAY_OUT}")
