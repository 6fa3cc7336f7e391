"""Dense matrices that stay in 16 bits inside a float32 model.

A float32 model's embedding and head are stored in 16 bits (FORMAT.md). Widened to float32 at load they would be half
of a small compressed model's memory, and the head most of the bytes that one decoded token reads. So they stay as they
are stored; each product widens what it needs and accumulates in float32. Nothing is rounded that was not before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from slablm.runtime import kernels


class _Narrow(nn.Module):
    """Holds the 16-bit matrix and knows the type to compute in.

    Args:
        weight: float16 or bfloat16.
        dtype: type of the computation; follows ``model.to(dtype)``, the weight never does.
    """

    weight: Tensor
    like: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Narrow:
        """Move the weight, never cast it; one tensor in two modules stays one."""
        stored = self.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.like.device
        self.weight = stored if stored.device == device else stored.to(device)
        return self


class NarrowEmbedding(_Narrow):
    """`torch.nn.Embedding` over a 16-bit matrix; its outputs have the computation's type.

    Args:
        weight: [num_embeddings, embedding_dim], float16 or bfloat16.
        padding_idx: as in `torch.nn.Embedding`.
        dtype: type of the computation.
    """

    def __init__(self, weight: Tensor, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [...] → [..., hidden_size]."""
        return functional.embedding(tokens, self.weight).to(self.like.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, stored={self.weight.dtype}"


class NarrowLinear(_Narrow):
    """`torch.nn.Linear` over a 16-bit matrix.

    Args:
        weight: [m, n], float16 or bfloat16.
        bias: [m] or None.
        dtype: type of the computation.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.out_features, self.in_features = weight.shape
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., n] → [..., m], in the inputs' dtype."""
        outputs = kernels.dense_linear(inputs, self.weight)
        return outputs if self.bias is None else outputs + self.bias.to(inputs.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, stored={self.weight.dtype}"
        )


def narrow_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace float32 embeddings and linear layers by narrow ones where `dtype` holds them without loss.

    Only plain `nn.Embedding` and `nn.Linear` on the CPU: a subclass may do more than its class, and what accelerate
    moves in and out has to stay a parameter. A matrix that several modules share is narrowed for all of them or none.

    Args:
        model: changed in place.
        dtype: float16 or bfloat16.
    """
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2:
            holders.setdefault(weight.data_ptr(), []).append(name)
    for names in holders.values():
        modules = [model.get_submodule(name) for name in names]
        if not all(_is_plain(module) for module in modules):
            continue
        wide = modules[0].weight
        assert isinstance(wide, Tensor)
        narrow = wide.detach().to(dtype).contiguous()  # the kernel reads rows
        if not torch.equal(narrow.float(), wide):
            continue
        for name, module in zip(names, modules, strict=True):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _narrowed(module, narrow))


def _is_plain(module: nn.Module) -> bool:
    if type(module) is nn.Embedding:
        special = module.max_norm is not None  # renormalises its weight in every forward
    elif type(module) is nn.Linear:
        special = False
    else:
        return False
    weight = module.weight
    return (
        not special
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and not hasattr(module, "_hf_hook")
    )


def _narrowed(module: nn.Module, weight: Tensor) -> nn.Module:
    if isinstance(module, nn.Linear):
        return NarrowLinear(weight, module.bias, torch.float32)
    assert isinstance(module, nn.Embedding)
    return NarrowEmbedding(weight, module.padding_idx, torch.float32)
