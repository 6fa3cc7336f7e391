"""`Decomposition` ↔ packed tensors.

Packing rounds values and factors to 16 bits once; from then on nothing changes: what is evaluated, saved, loaded and
unpacked is the same matrix, bit for bit. Values on a grid become FP16 whatever the factors are: in seven bits they can
be as close to each other as bfloat16 numbers are. The layout is specified in FORMAT.md.

A `PackedWeight` is what the kernels are made from; its *parts* are the tensors in a file. They are the same tensors,
unless the values lie on a grid: then a file holds codes and the grid (`slablm.packing.coded`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slablm.errors import SlabError
from slablm.methods.budget import signs_in_codes
from slablm.methods.decomposition import Decomposition, low_rank
from slablm.methods.grid import ValueGrid
from slablm.methods.select import kept_columns
from slablm.packing.coded import pack_codes, unpack_codes
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

WIDE_BITS = 16  # of values, factors, scales and offsets
# The parts that say what codes mean. Without them a code cannot be found again from its value.
GRID_PARTS = ("scales", "offsets")
# bfloat16 has 8 significant bits: above 128 steps its numbers are a whole step apart, and codes would be lost.
GRID_DTYPE = torch.float16


@dataclass(frozen=True)
class PackedSpec:
    """All that is needed to allocate a packed weight: its shape and what is stored.

    Attributes:
        out_features: m.
        in_features: n.
        kept: entries k kept in each row.
        rank: rank r of the factors, 0 for none.
        signs: ternary states (True) or a bitmap of positions (False).
        value_dtype: type of factors, and of values that are not on a grid.
        value_bits: bits of a code if the values lie on a grid, else None.
        group_size: columns that share a scale of the grid, else None.
        grid_dtype: type that values on a grid have in memory; without one it says nothing.
    """

    out_features: int
    in_features: int
    kept: int
    rank: int
    signs: bool
    value_dtype: torch.dtype
    value_bits: int | None = None
    group_size: int | None = None
    grid_dtype: torch.dtype = GRID_DTYPE

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor in a file, by name."""
        m, n, k = self.out_features, self.in_features, self.kept
        states, bitmap = ((m, packed_width(n, per_byte)) for per_byte in (STATES_PER_BYTE, BITS_PER_BYTE))
        factors = {"left": ((m, self.rank), self.value_dtype), "right": ((self.rank, n), self.value_dtype)}
        if self.value_bits is None or self.group_size is None:
            plane = {"states": (states, torch.uint8)} if self.signs else {"positions": (bitmap, torch.uint8)}
            return {"values": ((m, k), self.value_dtype), **factors, **plane}
        bits = self.value_bits + self.sign_in_code
        planes = {"states": states} if self.sign_in_code else {"positions": bitmap, "signs": bitmap}
        return {
            "codes": ((m, packed_width(k * bits, BITS_PER_BYTE)), torch.uint8),
            "scales": ((m, -(-n // self.group_size)), torch.float16),
            "offsets": ((m,), torch.float16),
            **factors,
            **{name: (shape, torch.uint8) for name, shape in planes.items()},
        }

    @property
    def sign_in_code(self) -> bool:
        """Whether codes carry the signs of kept entries (see `slablm.packing.coded`); False without a grid."""
        return self.value_bits is not None and signs_in_codes(self.in_features, self.kept, self.value_bits)

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.parts().values())

    @property
    def paper_bits(self) -> int:
        """Bits in the paper's accounting, `Decomposition.bits`: positions are free."""
        m, n = self.out_features, self.in_features
        kept, factors, signs = m * self.kept, WIDE_BITS * self.rank * (m + n), m * n if self.signs else 0
        if self.value_bits is None or self.group_size is None:
            return WIDE_BITS * kept + factors + signs
        return self.value_bits * kept + WIDE_BITS * m * (-(-n // self.group_size) + 1) + factors + signs

    def empty(self, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Uninitialised parts."""
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in self.parts().items()}

    def from_parts(self, parts: Mapping[str, Tensor], name: str = "weight") -> PackedWeight:
        """Put together what `PackedWeight.parts` took apart.

        Args:
            parts: the tensors in a file.
            name: how the error calls this weight.

        Raises:
            SlabError: with a grid, a row that does not keep k entries; without one, see `PackedWeight.validate`.
        """
        if self.value_bits is None or self.group_size is None:
            plane = parts["states" if self.signs else "positions"]
            return PackedWeight(self.in_features, parts["values"], parts["left"], parts["right"], plane, self.signs)
        grid = ValueGrid(parts["scales"], parts["offsets"], self.value_bits, self.group_size)
        codes = unpack_codes(parts["codes"], self.value_bits + self.sign_in_code, self.kept)
        if self.sign_in_code:
            plane = parts["states"]
            mask = unpack_states(plane, self.in_features) == 0
            _check_kept(mask.sum(dim=1), self.kept, name)
            negative = (codes >> self.value_bits).bool()
            codes = codes & (2**self.value_bits - 1)
        else:
            mask, signs = (unpack_bits(parts[name], self.in_features) for name in ("positions", "signs"))
            _check_kept(mask.sum(dim=1), self.kept, name)
            plane, negative = pack_states(mask, signs), signs[mask].view(codes.shape)
        magnitudes = grid.magnitudes(codes, kept_columns(mask, self.kept)).to(self.grid_dtype)
        values = torch.where(negative, -magnitudes, magnitudes)
        return PackedWeight(self.in_features, values, parts["left"], parts["right"], plane, signs=True, grid=grid)


@dataclass(frozen=True)
class PackedWeight:
    """A weight in its stored form.

    Attributes:
        in_features: n (the plane alone does not tell it).
        values: kept entries of each row in column order, [m, k] float16 or bfloat16.
        left: u, [m, r], same type; with a grid it may be another.
        right: vᵀ, [r, n], the type of u.
        plane: ternary states [m, ⌈n / 5⌉] or bitmap [m, ⌈n / 8⌉], uint8.
        signs: whether `plane` holds ternary states.
        grid: where the values lie if a file holds them as codes.
    """

    in_features: int
    values: Tensor
    left: Tensor
    right: Tensor
    plane: Tensor
    signs: bool
    grid: ValueGrid | None = None

    @property
    def spec(self) -> PackedSpec:
        """Shapes and types of this weight."""
        m, kept = self.values.shape
        stored = m, self.in_features, kept, self.left.shape[1], self.signs, self.left.dtype
        if self.grid is None:
            return PackedSpec(*stored)
        return PackedSpec(*stored, self.grid.bits, self.grid.group_size, self.values.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return self.spec.nbytes

    def parts(self) -> dict[str, Tensor]:
        """The tensors in a file, by name; `PackedSpec.from_parts` is the inverse."""
        spec, factors = self.spec, {"left": self.left, "right": self.right}
        if self.grid is None:
            return {"values": self.values, **factors, "states" if self.signs else "positions": self.plane}
        factor = unpack_states(self.plane, self.in_features)
        mask, negative = factor == 0, self.values.signbit()
        codes = self.grid.codes(self.values.float().abs(), kept_columns(mask, spec.kept))
        bits = self.grid.bits + spec.sign_in_code
        if spec.sign_in_code:
            codes, planes = codes | (negative.to(torch.uint8) << self.grid.bits), {"states": self.plane}
        else:
            signs = (factor < 0).masked_scatter_(mask, negative)
            planes = {"positions": pack_bits(mask), "signs": pack_bits(signs)}
        coded = {"codes": pack_codes(codes, bits), "scales": self.grid.scales, "offsets": self.grid.offsets}
        return {**coded, **factors, **planes}

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
        return Decomposition(
            mask=mask, values=self.values, left=self.left, right=self.right, signs=signs, grid=self.grid
        )

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
        _check_kept(kept, self.values.shape[1], name)


def pack(decomposition: Decomposition, value_dtype: torch.dtype, name: str = "weight") -> PackedWeight:
    """Round to `value_dtype` and pack.

    Args:
        decomposition: on any device.
        value_dtype: float16 or bfloat16; values on a grid become float16.
        name: how errors call this weight.

    Raises:
        SlabError: a value does not fit into the type's range.
    """
    types = {
        "values": value_dtype if decomposition.grid is None else GRID_DTYPE,
        "left": value_dtype,
        "right": value_dtype,
    }
    rounded = {key: getattr(decomposition, key).to(dtype) for key, dtype in types.items()}
    # One answer from the device, not three.
    if not torch.stack([torch.isfinite(tensor).all() for tensor in rounded.values()]).all():
        way_out = "use --value-dtype bfloat16" if decomposition.grid is None else "ignore this layer"
        raise SlabError(f"{name}: a value does not fit into {types['values']}: {way_out}")
    signs = decomposition.signs
    plane = pack_bits(decomposition.mask) if signs is None else pack_states(decomposition.mask, signs)
    return PackedWeight(
        in_features=decomposition.shape[1],
        values=rounded["values"].contiguous(),
        left=rounded["left"].contiguous(),
        right=rounded["right"].contiguous(),
        plane=plane,
        signs=signs is not None,
        grid=decomposition.grid,
    )


def _check_kept(kept: Tensor, k: int, name: str) -> None:
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
