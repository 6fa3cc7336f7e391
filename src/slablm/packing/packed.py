"""`Decomposition` ↔ packed tensors.

Packing rounds values and factors to 16 bits once; from then on nothing changes: what is evaluated, saved, loaded and
unpacked is the same matrix, bit for bit. The layout is specified in FORMAT.md.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    packed_width,
    unpack_bits,
    unpack_states,
)
from slablm.packing.spec import StoredSpec

WIDE_BITS = 16  # of values and factors


@dataclass(frozen=True)
class PackedSpec(StoredSpec):
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

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor in a file, by name."""
        m, n, k = self.out_features, self.in_features, self.kept
        states, bitmap = ((m, packed_width(n, per_byte)) for per_byte in (STATES_PER_BYTE, BITS_PER_BYTE))
        plane = {"states": (states, torch.uint8)} if self.signs else {"positions": (bitmap, torch.uint8)}
        return {
            "values": ((m, k), self.value_dtype),
            "left": ((m, self.rank), self.value_dtype),
            "right": ((self.rank, n), self.value_dtype),
            **plane,
        }

    @property
    def paper_bits(self) -> int:
        """Bits in the paper's accounting, `Decomposition.bits`: positions are free."""
        m, n = self.out_features, self.in_features
        signs = m * n if self.signs else 0
        return WIDE_BITS * (m * self.kept + self.rank * (m + n)) + signs

    def from_parts(self, parts: Mapping[str, Tensor], name: str = "weight") -> PackedWeight:
        """Put together what `PackedWeight.parts` took apart; see `PackedWeight.validate`."""
        plane = parts["states" if self.signs else "positions"]
        return PackedWeight(self.in_features, parts["values"], parts["left"], parts["right"], plane, self.signs)


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
        return PackedSpec(m, self.in_features, kept, self.left.shape[1], self.signs, self.left.dtype)

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return self.spec.nbytes

    def parts(self) -> dict[str, Tensor]:
        """The tensors in a file, by name; `PackedSpec.from_parts` is the inverse."""
        plane = "states" if self.signs else "positions"
        return {"values": self.values, "left": self.left, "right": self.right, plane: self.plane}

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
        """The decomposition, exactly as it was rounded by `pack_rows` (signs at kept positions read +)."""
        if self.signs:
            factor = unpack_states(self.plane, self.in_features)
            mask, signs = factor == 0, factor < 0
        else:
            mask, signs = unpack_bits(self.plane, self.in_features), None
        return Decomposition(mask=mask, values=self.values, left=self.left, right=self.right, signs=signs)

    def validate(self, name: str) -> None:
        """Check that the plane is one that `pack_rows` could have written.

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
        check_kept(kept, self.values.shape[1], name)


def pack_rows(decomposition: Decomposition, value_dtype: torch.dtype, name: str = "weight") -> PackedWeight:
    """Round to `value_dtype` and pack.

    Args:
        decomposition: on any device.
        value_dtype: float16 or bfloat16.
        name: how errors call this weight.

    Raises:
        SlabError: a value does not fit into the type's range.
    """
    rounded = {part: getattr(decomposition, part).to(value_dtype) for part in ("values", "left", "right")}
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


def check_kept(kept: Tensor, k: int, name: str) -> None:
    """Refuse a plane in which a row does not keep k entries; `kept` is how many each does, [m]."""
    wrong = torch.nonzero(kept != k)
    if len(wrong):
        row = int(wrong[0])
        raise SlabError(
            f"{name}: corrupted plane, row {row} keeps {int(kept[row])} entries where {k} values are stored"
        )


def _zeros_per_byte(plane: Tensor) -> Tensor:
    """Number of kept states in every byte, [m, bytes] int64."""
    codes = torch.arange(256, device=plane.device)[:, None] // 3 ** torch.arange(5, device=plane.device) % 3
    return (codes == 0).sum(dim=1)[plane.int()]
