"""`Decomposition` ↔ packed tensors.

Packing rounds values and factors to 16 bits once; from then on nothing changes: what is evaluated, saved, loaded and
unpacked is the same matrix, bit for bit. The layout is specified in FORMAT.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slablm.errors import SlabError
from slablm.methods.decomposition import Decomposition, low_rank
from slablm.packing.planes import (
    BITS_PER_BYTE,
    STATE_BYTE_LIMIT,
    STATES_PER_BYTE,
    pack_bits,
    pack_states,
    unpack_bits,
    unpack_states,
)


@dataclass(frozen=True)
class PackedSpec:
    """All that is needed to allocate a packed weight: its shape and what is stored.

    Attributes:
        out_features: m.
        in_features: n.
        kept: entries k kept in each row.
        rank: rank r of the factors, 0 for none.
        signs: ternary states (True) or a bitmap of positions (False).
        value_dtype: type of values and factors.
    """

    out_features: int
    in_features: int
    kept: int
    rank: int
    signs: bool
    value_dtype: torch.dtype

    def empty(self, device: torch.device | str | None = None) -> PackedWeight:
        """Uninitialised tensors of the right shapes and types."""
        m, n = self.out_features, self.in_features
        per_byte = STATES_PER_BYTE if self.signs else BITS_PER_BYTE
        return PackedWeight(
            in_features=n,
            values=torch.empty(m, self.kept, dtype=self.value_dtype, device=device),
            left=torch.empty(m, self.rank, dtype=self.value_dtype, device=device),
            right=torch.empty(self.rank, n, dtype=self.value_dtype, device=device),
            plane=torch.empty(m, -(-n // per_byte), dtype=torch.uint8, device=device),
            signs=self.signs,
        )


@dataclass(frozen=True)
class PackedWeight:
    """A weight in its stored form.

    Attributes:
        in_features: n (the plane alone does not tell it).
        values: kept entries of each row in column order, [m, k] float16 or bfloat16.
        left: u, [m, r], same type.
        right: vᵀ, [r, n], same type.
        plane: ternary states [m, ⌈n / 5⌉] or bitmap [m, ⌈n / 8⌉], uint8.
        signs: whether `plane` holds ternary states.
    """

    in_features: int
    values: Tensor
    left: Tensor
    right: Tensor
    plane: Tensor
    signs: bool

    @property
    def spec(self) -> PackedSpec:
        """Shapes and types of this weight."""
        m, kept = self.values.shape
        return PackedSpec(m, self.in_features, kept, self.left.shape[1], self.signs, self.values.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.values, self.left, self.right, self.plane))

    def dense(self) -> Tensor:
        """Ŵ, [m, n] float32: the reference every kernel is compared with."""
        if self.signs:
            factor = unpack_states(self.plane, self.in_features)
            mask = factor == 0
            weight = factor.mul_(low_rank(self.left, self.right))
        else:
            mask = unpack_bits(self.plane, self.in_features)
            weight = low_rank(self.left, self.right)
        return weight.masked_scatter_(mask, self.values.float())

    def unpack(self) -> Decomposition:
        """The decomposition, exactly as it was rounded by `pack` (signs at kept positions read +)."""
        if self.signs:
            factor = unpack_states(self.plane, self.in_features)
            mask, signs = factor == 0, factor < 0
        else:
            mask, signs = unpack_bits(self.plane, self.in_features), None
        return Decomposition(mask=mask, values=self.values, left=self.left, right=self.right, signs=signs)

    def validate(self, name: str) -> None:
        """Check that the plane is one that `pack` could have written.

        Args:
            name: how the error calls this weight.

        Raises:
            SlabError: an unused byte value, or a row that does not keep k entries.
        """
        if self.signs:
            if (self.plane >= STATE_BYTE_LIMIT).any():
                raise SlabError(f"{name}: corrupted state plane (a byte above {STATE_BYTE_LIMIT - 1})")
            kept = _zeros_per_byte(self.plane).sum(dim=1)
        else:
            kept = unpack_bits(self.plane, self.plane.shape[1] * BITS_PER_BYTE).sum(dim=1)
        wrong = torch.nonzero(kept != self.values.shape[1])
        if len(wrong):
            row = int(wrong[0])
            raise SlabError(
                f"{name}: corrupted plane, row {row} keeps {int(kept[row])} entries where {self.values.shape[1]} "
                "values are stored"
            )


def pack(decomposition: Decomposition, value_dtype: torch.dtype, name: str = "weight") -> PackedWeight:
    """Round to `value_dtype` and pack.

    Args:
        decomposition: on any device.
        value_dtype: float16 or bfloat16.
        name: how errors call this weight.

    Raises:
        SlabError: a value does not fit into the type's range.
    """
    rounded = {key: getattr(decomposition, key).to(value_dtype) for key in ("values", "left", "right")}
    # One answer from the device, not three.
    if not torch.stack([torch.isfinite(tensor).all() for tensor in rounded.values()]).all():
        raise SlabError(f"{name}: a value does not fit into {value_dtype}: use --value-dtype bfloat16")
    signs = decomposition.signs
    plane = pack_bits(decomposition.mask) if signs is None else pack_states(decomposition.mask, signs)
    return PackedWeight(
        in_features=decomposition.shape[1],
        values=rounded["values"].contiguous(),
        left=rounded["left"].contiguous(),
        right=rounded["right"].contiguous(),
        plane=plane,
        signs=signs is not None,
    )


def _zeros_per_byte(plane: Tensor) -> Tensor:
    """Number of kept states in every byte, [m, bytes] int64."""
    codes = torch.arange(256, device=plane.device)[:, None] // 3 ** torch.arange(5, device=plane.device) % 3
    return (codes == 0).sum(dim=1)[plane.int()]
