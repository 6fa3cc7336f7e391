"""`SlabLinear`: a linear layer that holds its weight packed.

    y = Ŵ x + bias,      Ŵ = values where kept, ±Σᵢ uᵢ vᵢᵀ elsewhere

As loaded or compressed, the forward is the reference: unpack Ŵ, multiply, let Ŵ go. At most one dense weight exists at
a time, and only while its layer runs. After `SlabLinear.use_native` the kernels of its device read the packed weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from slablm import kernels
from slablm.packing import PackedSpec, PackedWeight


class SlabLinear(nn.Module):
    """Drop-in replacement for `torch.nn.Linear` over a packed weight.

    The packed tensors are buffers named `values`, `left`, `right` and `states` (ternary) or `positions` (bitmap); see
    FORMAT.md. They keep their own types: ``model.to(dtype)`` changes the computation, not the stored weight.

    Args:
        weight: the packed weight.
        bias: [m] or None.
    """

    values: Tensor
    left: Tensor
    right: Tensor
    native: kernels.NativeWeight | kernels.GpuWeight | None = None

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.values.shape[0], weight.in_features
        self.signs = weight.signs
        self.register_buffer("values", weight.values)
        self.register_buffer("left", weight.left)
        self.register_buffer("right", weight.right)
        self.register_buffer(self.plane_name, weight.plane)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_spec(cls, spec: PackedSpec, bias: Tensor | None = None) -> SlabLinear:
        """A layer with uninitialised buffers, to be filled by a checkpoint."""
        return cls(spec.empty(), bias)

    @property
    def plane_name(self) -> str:
        """Name of the buffer that says what each position is."""
        return "states" if self.signs else "positions"

    @property
    def packed(self) -> PackedWeight:
        """The packed weight; shares the buffers' memory, or is made from the runtime layout.

        Raises:
            SlabError: the values were quantized to 8 bits.
        """
        if self.native is not None:
            return kernels.from_runtime(self.native)
        plane = getattr(self, self.plane_name)
        return PackedWeight(self.in_features, self.values, self.left, self.right, plane, self.signs)

    def use_native(self, value_bits: int = 16, name: str = "weight") -> None:
        """Turn the buffers into the runtime layout of their device's kernels; their memory is given back.

        Args:
            value_bits: 16 keeps the stored values, 8 quantizes them (such a layer can no longer be saved).
            name: how errors call this layer.

        Raises:
            SlabError: a corrupted plane, or an unknown `value_bits`.
        """
        self.native = kernels.to_runtime(self.packed, value_bits, name)
        for buffer in self._buffers:
            self._buffers[buffer] = None

    def use_packed(self) -> None:
        """Undo `use_native`."""
        packed, self.native = self.packed, None
        self.values, self.left, self.right = packed.values, packed.left, packed.right
        setattr(self, self.plane_name, packed.plane)

    def unpacked(self, dtype: torch.dtype) -> nn.Linear:
        """A dense layer that computes what this one does on the reference.

        Args:
            dtype: type of its weight, Ŵ.

        Raises:
            SlabError: the values were quantized to 8 bits.
        """
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.packed.dense().to(dtype), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., n] → [..., m], in the inputs' dtype."""
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        if self.native is not None:
            outputs = kernels.linear(inputs, self.native)
            return outputs if bias is None else outputs + bias
        return functional.linear(inputs, self.packed.dense().to(inputs.dtype), bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        source = self.native or self.packed.spec
        native = "" if self.native is None else f", native={str(self.native.values.dtype).removeprefix('torch.')}"
        return (
            f"in_features={source.in_features}, out_features={source.out_features}, kept={source.kept}, "
            f"rank={source.rank}, signs={source.signs}, bias={self.bias is not None}{native}"
        )

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """What is saved is the packed weight, whatever the layout in memory."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.native is not None:
            packed = self.packed
            for buffer, tensor in zip(
                ("values", "left", "right", self.plane_name),
                (packed.values, packed.left, packed.right, packed.plane),
                strict=True,
            ):
                destination[prefix + buffer] = tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlabLinear:
        """Move the packed weight, never cast it: float16 → bfloat16 would change the stored weight."""

        def move_only(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device) if any(tensor is b for b in packed) else fn(tensor)

        moved = self.native is not None and _changes_device(fn, self.native.values.device)
        if moved:
            self.use_packed()
        packed = list(self._buffers.values())
        super()._apply(move_only, recurse)  # type: ignore[no-untyped-call]
        if moved and kernels.backend(self.values.device).name != kernels.REFERENCE:
            self.use_native()
        return self


def _changes_device(fn: Callable[[Tensor], Tensor], device: torch.device) -> bool:
    return fn(torch.empty(0, device=device)).device != device
