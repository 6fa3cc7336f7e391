"""What the layouts for CPU and GPU have in common: sizes, stored values, and the way back to a packed weight.

A layout has bit planes with words of its own width, and values, rows one after the other, with a padding at the end
that kernels may read and ignore.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from slablm.errors import SlabError
from slablm.packing import PackedWeight
from slablm.packing.planes import pack_bits, pack_states
from slablm.packing.quantize import quantize_values

VALUE_BITS = (8, 16)


class RuntimeWeight:
    """A weight [m, n] as kernels read it; the layouts are dataclasses that say what their tensors are."""

    in_features: int
    values: Tensor
    scales: Tensor | None
    planes: Tensor
    left: Tensor
    right: Tensor

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """What the operator takes: all fields but n, in order."""
        raise NotImplementedError

    @property
    def padding(self) -> int:
        """Values behind the last one."""
        raise NotImplementedError

    def masks(self, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Kept positions and, if there are signs, negative positions of rows begin … end, [end − begin, n] bool."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.values.device

    @property
    def out_features(self) -> int:
        """Rows m."""
        return self.planes.shape[0]

    @property
    def kept(self) -> int:
        """Entries k kept in each row."""
        return (self.values.numel() - self.padding) // self.out_features

    @property
    def rank(self) -> int:
        """Rank r of the factors."""
        return self.left.shape[1]

    @property
    def signs(self) -> bool:
        """Whether there is a plane of signs."""
        return self.planes.shape[2] == 2

    @property
    def rows(self) -> Tensor:
        """The values without padding, [m, k]; shares memory."""
        return self.values[: self.out_features * self.kept].view(self.out_features, self.kept)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that are there."""
        return [tensor for tensor in self.arguments if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def check_value_bits(value_bits: int) -> None:
    """Refuse what is not in `VALUE_BITS`.

    Raises:
        SlabError: an unknown `value_bits`.
    """
    if value_bits not in VALUE_BITS:
        raise SlabError(f"value_bits must be 8 or 16, got {value_bits}")


def values_and_scales(packed: PackedWeight, value_bits: int, padding: int) -> tuple[Tensor, Tensor | None]:
    """Stored or quantized values, one-dimensional and padded, and their scales.

    Args:
        packed: the weight.
        value_bits: 16 keeps the stored values, 8 quantizes them.
        padding: values behind the last one.
    """
    values, scales = (packed.values, None) if value_bits == 16 else quantize_values(packed.values)
    return functional.pad(values.reshape(-1), (0, padding)), scales


def wide_factors(packed: PackedWeight, word: int) -> tuple[Tensor, Tensor]:
    """u, [m, r], and vᵀ, [r, n filled up with 0 to whole words], in float32.

    Args:
        packed: the weight.
        word: columns of a word.
    """
    right = functional.pad(packed.right.float(), (0, -packed.in_features % word))
    return packed.left.float().contiguous(), right.contiguous()


def from_runtime(weight: RuntimeWeight) -> PackedWeight:
    """The packed weight that a layout was made of, bit for bit.

    Args:
        weight: its values must not be quantized.

    Raises:
        SlabError: the values were quantized to 8 bits; the checkpoint's are gone.
    """
    if weight.scales is not None:
        raise SlabError("8-bit values cannot be turned back into stored ones: load the checkpoint with 16-bit values")
    n, dtype = weight.in_features, weight.values.dtype
    kept, minus = weight.masks(0, weight.out_features)
    return PackedWeight(
        in_features=n,
        values=weight.rows.clone(),
        left=weight.left.to(dtype),
        right=weight.right[:, :n].to(dtype).contiguous(),
        plane=pack_bits(kept) if minus is None else pack_states(kept, minus),
        signs=minus is not None,
    )
