"""`SlabLinear`: a linear layer that holds its weight packed.

    y = Ŵ x + bias

A `SymbolLinear` has one symbol per weight. Its buffers are the tensors of a file, and that is what the kernels read.

A `RowLinear` keeps some entries of each row, Ŵ = values where kept, ±Σᵢ uᵢ vᵢᵀ elsewhere. As loaded or compressed, the
forward is the reference: unpack Ŵ, multiply, let Ŵ go. At most one dense weight exists at a time, and only while its
layer runs. After `use_native` the kernels of its device read a layout of their own. In either layout the tensors are
buffers of the layer, and a state dict holds the parts of the packed weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from operator import is_not
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from slablm.errors import SlabError
from slablm.packing import Packed, PackedSpec, PackedSymbols, PackedWeight, Spec, SymbolSpec
from slablm.runtime import kernels

_RUNTIME = "native_"  # in front of the names of runtime buffers: a packed weight has a part `values` too
_Layout = type[kernels.NativeWeight] | type[kernels.GpuWeight]
_BUFFERS = {
    layout: tuple(_RUNTIME + field.name for field in fields(layout) if field.name != "in_features")
    for layout in (kernels.NativeWeight, kernels.GpuWeight)
}


class SlabLinear(nn.Module):
    """Drop-in replacement for `torch.nn.Linear` over a packed weight; made by `from_packed` and `from_spec`.

    Its buffers are the parts of the packed weight (`Spec.parts`), as a file holds them; see FORMAT.md. All keep their
    own types: ``model.to(dtype)`` changes the computation, not the stored weight.

    Args:
        spec: what is stored.
        parts: the tensors.
        bias: [m] or None.

    Attributes:
        runs_native: whether kernels run it; else the reference does.
        value_bits: bits of kept entries in memory, as of `use_native`.
        changes: rises whenever an attribute of any layer is set or any of them is moved: as long as it has not, all are
            where they were.
    """

    runs_native = False
    value_bits = 16
    changes: ClassVar[int] = 0

    def __init__(self, spec: Spec, parts: Mapping[str, Tensor], bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = spec.out_features, spec.in_features
        self.spec = spec
        for name in spec.parts():
            self.register_buffer(name, parts[name])
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @staticmethod
    def from_packed(weight: Packed, bias: Tensor | None = None) -> SlabLinear:
        """A layer that holds this weight."""
        return _kind(weight.spec)(weight.spec, weight.parts(), bias)

    @staticmethod
    def from_spec(spec: Spec, bias: Tensor | None = None, device: str | None = None) -> SlabLinear:
        """A layer with uninitialised buffers, to be filled by a checkpoint."""
        return _kind(spec)(spec, spec.empty(device), bias)

    @property
    def packed(self) -> Packed:
        """The packed weight.

        Raises:
            SlabError: values were quantized to 8 bits; or see `CodedSpec.from_parts`.
        """
        return self.spec.from_parts(self._parts)

    @property
    def _parts(self) -> dict[str, Tensor]:
        """The parts; in no other layout."""
        return {name: tensor for name in self.spec.parts() if (tensor := self._buffers[name]) is not None}

    def validate(self, name: str) -> None:
        """Check the parts; see `PackedWeight.validate` and `PackedSymbols.validate`.

        Args:
            name: how the error calls this layer.

        Raises:
            SlabError: a corrupted part.
        """
        self.spec.from_parts(self._parts, name).validate(name)

    @property
    def qweight(self) -> Tensor:
        """The largest part: where libraries that know quantized layers (PEFT) look for a layer's device."""
        return self.get_buffer(next(iter(self.spec.parts())))

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.qweight.device

    def use_native(self, value_bits: int = 16, name: str = "weight") -> None:
        """Let the kernels of the device run the layer.

        Args:
            value_bits: of kept entries: 16 keeps the stored values, 8 quantizes them (such a layer can no longer be
                saved).
            name: how errors call this layer.

        Raises:
            SlabError: a corrupted part, or a `value_bits` that is unknown or that the layer cannot have.
        """
        raise NotImplementedError

    def use_packed(self) -> None:
        """Undo `use_native`."""
        raise NotImplementedError

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
        if self.runs_native:
            outputs = self._on_kernels(inputs)
            return outputs if bias is None else outputs + bias
        kernels.check_inputs(inputs, self.device, self.in_features)
        if inputs.is_meta:
            return inputs.new_empty(*inputs.shape[:-1], self.out_features)
        return functional.linear(inputs, self.packed.dense().to(inputs.dtype), bias)

    def _on_kernels(self, inputs: Tensor) -> Tensor:
        """Ŵ x."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self._form()}"

    def _form(self) -> str:
        """What there is beside the shape."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        """As for every module, and counted."""
        super().__setattr__(name, value)
        SlabLinear.changes += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlabLinear:
        """Move the packed weight, never cast it: float16 → bfloat16 would change the stored weight."""

        def move_only(tensor: Tensor) -> Tensor:
            if not any(tensor is buffer for buffer in buffers):
                return fn(tensor)
            moved = fn(tensor)  # may move memory in place, as `share_memory` does
            if moved.device == tensor.device:
                return tensor
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        buffers = list(self._buffers.values())
        super()._apply(move_only, recurse)  # type: ignore[no-untyped-call]
        SlabLinear.changes += 1
        return self


class SymbolLinear(SlabLinear):
    """A layer with one symbol per weight: what a file holds is what the kernels read."""

    spec: SymbolSpec

    @property
    def packed(self) -> PackedSymbols:
        """The packed weight; shares the buffers' memory."""
        return self.spec.from_parts(self._buffers)  # type: ignore[arg-type]

    def use_native(self, value_bits: int = 16, name: str = "weight") -> None:
        """As `SlabLinear.use_native`."""
        if value_bits != 16:
            raise SlabError(f"{name} has symbols of {self.spec.bits} bits and no values to make {value_bits} bits of")
        self.packed.validate(name)
        self.runs_native = True

    def use_packed(self) -> None:
        """As `SlabLinear.use_packed`."""
        self.runs_native = False

    def _on_kernels(self, inputs: Tensor) -> Tensor:
        return kernels.symbols_linear(inputs, self.packed)

    def _form(self) -> str:
        spec = self.spec
        turned = "" if spec.rotation is None else f", rotation={spec.rotation.block}"
        return f"symbol_bits={spec.bits}{turned}"


class RowLinear(SlabLinear):
    """A layer that keeps some entries of every row.

    In runtime layout its buffers are the tensors of `native`, as ``native_...``, none of which is saved.
    """

    # The weight that was last made of the runtime buffers; see `native`.
    _native: kernels.NativeWeight | kernels.GpuWeight | None = None
    _layout: _Layout | None = None

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
    def runs_native(self) -> bool:  # type: ignore[override]
        """Whether kernels run it."""
        return self._layout is not None

    @property
    def value_bits(self) -> int:  # type: ignore[override]
        """As of `use_native`."""
        return 16 if self.native is None or self.native.scales is None else 8

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, made from the parts or from the runtime layout.

        Raises:
            SlabError: the values were quantized to 8 bits; or see `CodedSpec.from_parts`.
        """
        if self.native is None:
            packed = super().packed
            assert isinstance(packed, PackedWeight)
            return packed
        return kernels.from_runtime(self.native)

    @property
    def qweight(self) -> Tensor:
        """As `SlabLinear.qweight`."""
        return super().qweight if self.native is None else self.get_buffer(_RUNTIME + "values")

    def renew(self, name: str) -> None:
        """Take parts of an older format over into those of the present one; the numbers stay.

        Args:
            name: how errors call this layer.

        Raises:
            SlabError: see `CodedSpec.from_parts`.
        """
        if isinstance(self.spec, PackedSpec):
            return
        packed = self.spec.from_parts(self._parts, name)
        assert isinstance(packed, PackedWeight)
        for part in self.spec.parts():
            delattr(self, part)
        self.spec = packed.spec
        for part, tensor in packed.parts().items():
            self.register_buffer(part, tensor)

    def use_native(self, value_bits: int = 16, name: str = "weight") -> None:
        """As `SlabLinear.use_native`: the parts become the layout of the kernels, and their memory is free."""
        self._set_native(kernels.to_runtime(self.packed, value_bits, name))
        for part in self.spec.parts():
            self._buffers[part] = None

    def use_packed(self) -> None:
        """As `SlabLinear.use_packed`."""
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

    def _on_kernels(self, inputs: Tensor) -> Tensor:
        native = self.native
        assert native is not None
        return kernels.linear(inputs, native)

    def _form(self) -> str:
        spec, layout = self.spec, "" if self.native is None else f", native={self.native.values.dtype}"
        return (
            f"kept={spec.kept}, rank={spec.rank}, signs={spec.signs}" if isinstance(spec, PackedSpec) else f"{spec}"
        ) + layout.replace("torch.", "")

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
        assert isinstance(packed, PackedWeight)
        if kernels.backend(packed.device).name == kernels.REFERENCE and packed.device != self.device:
            self._set_native(None)
            self._buffers.update(parts)
            return
        after = kernels.to_runtime(packed, 16 if before.scales is None else 8, name)
        if assign:
            self._set_native(after)
            return
        for old_tensor, new_tensor in zip(before.tensors, after.tensors, strict=True):
            old_tensor.copy_(new_tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlabLinear:
        """Move the packed weight, which is then laid out anew."""
        moved = self.native is not None and _changes_device(fn, self.device)
        if moved:
            self.use_packed()
        super()._apply(fn, recurse)
        if moved and kernels.backend(self.device).name != kernels.REFERENCE:
            self.use_native()
        return self


def _kind(spec: Spec) -> type[SlabLinear]:
    return SymbolLinear if isinstance(spec, SymbolSpec) else RowLinear


def _changes_device(fn: Callable[[Tensor], Tensor], device: torch.device) -> bool:
    return fn(torch.empty(0, device=device)).device != device
