"""`SlabLinear`: a linear layer that holds its weight packed.

    y = Ŵ x + bias,      Ŵ = values where kept, ±Σᵢ uᵢ vᵢᵀ elsewhere

As loaded or compressed, the forward is the reference: unpack Ŵ, multiply, let Ŵ go. At most one dense weight exists at
a time, and only while its layer runs. After `SlabLinear.use_native` the kernels of its device read the packed weight.
In either layout the tensors are buffers of the layer, and a state dict holds the parts of the packed weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slablm.errors import SlabError
from slablm.methods.grid import ValueGrid
from slablm.packing import GRID_PARTS, PackedSpec, PackedWeight
from slablm.runtime import kernels
from slablm.runtime.replace_module import replace_module

_RUNTIME = "native_"  # in front of the names of runtime buffers: a packed weight has a part `values` too
_Layout = type[kernels.NativeWeight] | type[kernels.GpuWeight]
_BUFFERS = {
    layout: tuple(_RUNTIME + field.name for field in fields(layout) if field.name != "in_features")
    for layout in (kernels.NativeWeight, kernels.GpuWeight)
}


class SlabLinear(nn.Module):
    """Drop-in replacement for `torch.nn.Linear` over a packed weight.

    Its buffers are the parts of the packed weight (`PackedSpec.parts`), as a file holds them; see FORMAT.md. In runtime
    layout they are the tensors of `native`, as ``native_...``, none of which is saved. All keep their own types:
    ``model.to(dtype)`` changes the computation, not the stored weight.

    Args:
        spec: what is stored.
        parts: the tensors.
        bias: [m] or None.
    """

    left: Tensor
    scales: Tensor  # with a grid
    offsets: Tensor
    # The weight that was last made of the runtime buffers; see `native`.
    _native: kernels.NativeWeight | kernels.GpuWeight | None = None
    _layout: _Layout | None = None

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
    def native(self) -> kernels.NativeWeight | kernels.GpuWeight | None:
        """The weight in runtime layout, or None before `use_native`. Its tensors are the buffers, whoever set them."""
        layout, native = self._layout, self._native
        if layout is None:
            return None
        names = _BUFFERS[layout]
        if native is None or any(map(is_not, map(self._buffers.get, names), native.arguments)):
            native = self._native = layout(self.in_features, *map(self._buffers.get, names))  # type: ignore[arg-type]
        return native

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
    def qweight(self) -> Tensor:
        """The stored values or codes: where libraries that know quantized layers (PEFT) look for a layer's device."""
        name = next(iter(self.spec.parts())) if self.native is None else _RUNTIME + "values"
        return self.get_buffer(name)

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
        self._set_native(kernels.to_runtime(packed, value_bits, name))
        for part in self.spec.parts():
            if part not in GRID_PARTS:
                self._buffers[part] = None

    def use_packed(self) -> None:
        """Undo `use_native`."""
        parts = self.packed.parts()
        self._set_native(None)
        self._buffers.update(parts)

    def _set_native(self, native: kernels.NativeWeight | kernels.GpuWeight | None) -> None:
        for name in [name for name in self._buffers if name.startswith(_RUNTIME)]:
            delattr(self, name)
        self._layout, self._native = None if native is None else type(native), native
        if native is None:
            return
        for name, tensor in zip(_BUFFERS[type(native)], native.arguments, strict=True):
            if tensor is not None:  # scales of 16-bit values
                self.register_buffer(name, tensor, persistent=False)

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
        """[..., n] → [..., m], in the inputs' dtype; on the meta device, shapes alone.

        Raises:
            SlabError: inputs on another device, or of another width.
        """
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        native = self.native
        if native is not None:
            outputs = kernels.linear(inputs, native)
            return outputs if bias is None else outputs + bias
        kernels.check_inputs(inputs, self.device, self.in_features)
        if inputs.is_meta:
            return inputs.new_empty(*inputs.shape[:-1], self.out_features)
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

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their own `native` of their own buffers."""
        return vars(self) | {"_native": None}

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """What is saved is the packed weight, whatever the layout in memory."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.native is not None:
            for part, tensor in self.packed.parts().items():
                destination[prefix + part] = tensor

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, local: Any, *lists: Any) -> None:
        """Load the packed parts; in runtime layout, torch is given packed buffers to fill, which are then laid out.

        What is wrong with them becomes an error message, as in every module, and the weight stays as it was.
        """
        if self.native is None:
            super()._load_from_state_dict(state_dict, prefix, local, *lists)
            return
        given = [prefix + part in state_dict for part in self.spec.parts()]
        before, errors = dict(self._buffers), lists[-1]
        known = len(errors)
        try:
            self._buffers.update(self._parts_to_fill(given))
            super()._load_from_state_dict(state_dict, prefix, local, *lists)
            filled = self._parts
            self._buffers.update(before)
            if any(given) and len(errors) == known:
                self._replace_native(filled, prefix[:-1] or "weight", local.get("assign_to_params_buffers", False))
        except SlabError as error:
            errors.append(str(error))
        except BaseException:
            self._buffers.update(before)
            raise

    def _parts_to_fill(self, given: list[bool]) -> dict[str, Tensor]:
        """Parts that may be overwritten where they are given, and elsewhere hold what the layer has."""
        if all(given):
            return self.spec.empty(self.device)
        if any(given):
            return {name: tensor.clone() for name, tensor in self.packed.parts().items()}
        return self.spec.empty("meta")  # to report what is missing

    def _replace_native(self, parts: dict[str, Tensor], name: str, assign: bool) -> None:
        """Lay other parts out, in the memory of the old ones unless they are to be assigned."""
        before = self.native
        assert before is not None
        packed = self.spec.from_parts(parts, name)
        if kernels.backend(packed.values.device).name == kernels.REFERENCE and packed.values.device != self.device:
            self._set_native(None)
            self._buffers.update(parts)
            return
        after = kernels.to_runtime(packed, 16 if before.scales is None else 8, name)
        grid = {part: tensor for part, tensor in parts.items() if part in GRID_PARTS}
        if assign:
            self._set_native(after)
            self._buffers.update(grid)
            return
        old = [*before.tensors, *(self.get_buffer(part) for part in grid)]
        for old_tensor, new_tensor in zip(old, [*after.tensors, *grid.values()], strict=True):
            old_tensor.copy_(new_tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlabLinear:
        """Move the packed weight, never cast it: float16 → bfloat16 would change the stored weight."""

        def move_only(tensor: Tensor) -> Tensor:
            if not any(tensor is buffer for buffer in buffers):
                return fn(tensor)
            moved = fn(tensor)  # may move memory in place, as `share_memory` does
            if moved.device == tensor.device:
                return tensor
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        moved = self.native is not None and _changes_device(fn, self.device)
        if moved:
            self.use_packed()
        buffers = list(self._buffers.values())
        super()._apply(move_only, recurse)  # type: ignore[no-untyped-call]
        if moved and kernels.backend(self.device).name != kernels.REFERENCE:
            self.use_native()
        return self


def _changes_device(fn: Callable[[Tensor], Tensor], device: torch.device) -> bool:
    return fn(torch.empty(0, device=device)).device != device


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
