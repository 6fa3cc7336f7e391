"""`SlabLinear`: a linear layer that holds its weight packed.

    y = Ŵ x + bias,      Ŵ = values where kept, ±Σᵢ uᵢ vᵢᵀ elsewhere

As loaded or compressed, the forward is the reference: unpack Ŵ, multiply, let Ŵ go. At most one dense weight exists at
a time, and only while its layer runs. After `SlabLinear.use_native` the kernels of its device read the packed weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from slablm.methods.grid import ValueGrid
from slablm.packing import GRID_PARTS, PackedSpec, PackedWeight
from slablm.runtime import kernels


class SlabLinear(nn.Module):
    """Drop-in replacement for `torch.nn.Linear` over a packed weight.

    Its buffers are the parts of the packed weight (`PackedSpec.parts`), as a file holds them; see FORMAT.md. They keep
    their own types: ``model.to(dtype)`` changes the computation, not the stored weight.

    Args:
        spec: what is stored.
        parts: the tensors.
        bias: [m] or None.
    """

    left: Tensor
    scales: Tensor  # with a grid
    offsets: Tensor
    native: kernels.NativeWeight | kernels.GpuWeight | None = None

    def __init__(self, spec: PackedSpec, parts: Mapping[str, Tensor], bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = spec.out_features, spec.in_features
        self.spec = spec
        for name in spec.parts():
            self.register_buffer(name, parts[name])
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_packed(cls, weight: PackedWeight, bias: Tensor | None = None) -> SlabLinear:
        """A layer that holds this weight."""
        return cls(weight.spec, weight.parts(), bias)

    @classmethod
    def from_spec(cls, spec: PackedSpec, bias: Tensor | None = None) -> SlabLinear:
        """A layer with uninitialised buffers, to be filled by a checkpoint."""
        return cls(spec, spec.empty(), bias)

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, made from the parts or from the runtime layout.

        Raises:
            SlabError: the values were quantized to 8 bits; or see `PackedSpec.from_parts`.
        """
        if self.native is None:
            return self.spec.from_parts(self._parts)
        return replace(kernels.from_runtime(self.native, self.spec.value_dtype), grid=self._grid)

    @property
    def _parts(self) -> dict[str, Tensor]:
        """The parts; only before `use_native`."""
        return {name: tensor for name in self.spec.parts() if (tensor := self._buffers[name]) is not None}

    def validate(self, name: str) -> None:
        """Check the planes; see `PackedWeight.validate`.

        Args:
            name: how the error calls this layer.

        Raises:
            SlabError: a corrupted plane.
        """
        self.spec.from_parts(self._parts, name).validate(name)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.left.device if self.native is None else self.native.values.device

    @property
    def _grid(self) -> ValueGrid | None:
        """The grid of the values; its small tensors stay, as codes can only be found again with them."""
        if self.spec.value_bits is None or self.spec.group_size is None:
            return None
        return ValueGrid(self.scales, self.offsets, self.spec.value_bits, self.spec.group_size)

    def use_native(self, value_bits: int = 16, name: str = "weight") -> None:
        """Turn the parts into the runtime layout of their device's kernels; their memory is given back.

        Args:
            value_bits: 16 keeps the stored values, 8 quantizes them (such a layer can no longer be saved).
            name: how errors call this layer.

        Raises:
            SlabError: a corrupted plane, or an unknown `value_bits`.
        """
        packed = self.spec.from_parts(self._parts, name) if self.native is None else self.packed
        self.native = kernels.to_runtime(packed, value_bits, name)
        for part in self.spec.parts():
            if part not in GRID_PARTS:
                self._buffers[part] = None

    def use_packed(self) -> None:
        """Undo `use_native`."""
        parts, self.native = self.packed.parts(), None
        self._buffers.update(parts)

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
        spec = self.spec
        native = "" if self.native is None else f", native={str(self.native.values.dtype).removeprefix('torch.')}"
        return (
            f"in_features={spec.in_features}, out_features={spec.out_features}, kept={spec.kept}, "
            f"rank={spec.rank}, signs={spec.signs}, value_bits={spec.value_bits or 16}, "
            f"bias={self.bias is not None}{native}"
        )

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """What is saved is the packed weight, whatever the layout in memory."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.native is not None:
            for part, tensor in self.packed.parts().items():
                destination[prefix + part] = tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlabLinear:
        """Move the packed weight, never cast it: float16 → bfloat16 would change the stored weight."""

        def move_only(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device) if any(tensor is b for b in packed) else fn(tensor)

        moved = self.native is not None and _changes_device(fn, self.native.values.device)
        if moved:
            self.use_packed()
        packed = list(self._buffers.values())
        super()._apply(move_only, recurse)  # type: ignore[no-untyped-call]
        if moved and kernels.backend(self.device).name != kernels.REFERENCE:
            self.use_native()
        return self


def _changes_device(fn: Callable[[Tensor], Tensor], device: torch.device) -> bool:
    return fn(torch.empty(0, device=device)).device != device
