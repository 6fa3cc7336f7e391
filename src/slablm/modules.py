"""`SlabLinear`: a linear layer that holds its weight packed.

    y = Ŵ x + bias,      Ŵ = values where kept, ±Σᵢ uᵢ vᵢᵀ elsewhere

The forward here is the reference: unpack Ŵ, multiply, let Ŵ go. At most one dense weight exists at a time, and only
while its layer runs.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

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
        """The packed weight; shares the buffers' memory."""
        plane = getattr(self, self.plane_name)
        return PackedWeight(self.in_features, self.values, self.left, self.right, plane, self.signs)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., n] → [..., m], in the inputs' dtype."""
        weight = self.packed.dense().to(inputs.dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return functional.linear(inputs, weight, bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        spec = self.packed.spec
        return (
            f"in_features={spec.in_features}, out_features={spec.out_features}, kept={spec.kept}, rank={spec.rank}, "
            f"signs={spec.signs}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlabLinear:
        """Move the packed buffers, never cast them: float16 → bfloat16 would change the stored weight."""

        def move_only(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device) if any(tensor is b for b in packed) else fn(tensor)

        packed = list(self._buffers.values())
        super()._apply(move_only, recurse)  # type: ignore[no-untyped-call]
        return self
