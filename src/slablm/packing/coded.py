"""Magnitudes on a grid: how `slab+` was stored in formats 2 to 5. Nothing writes this any more; it is read.

A kept entry has a sign and a code c of b bits,

    |Ŵ_ij| = s_ig (a_i + c),      g = ⌊j / group_size⌋,

computed in float32 and rounded to FP16 (or to bfloat16, in models of that type before format 4). Signs lie in one of
two places, whichever took less:

    signs in the codes     ternary states, 1.6 bits per weight, and b + 1 bits per kept entry (the sign is the top bit)
    signs in a plane       a bitmap of positions and one of signs, 2 bits per weight, and b bits per kept entry

Codes lie row by row, the lowest bit first, without gaps; a row is filled up to a whole byte. `CodedSpec.from_parts`
turns all that into a `PackedWeight` with 16-bit values: the same numbers, in the form that is written today.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slablm.errors import SlabError
from slablm.methods.select import kept_columns
from slablm.packing.packed import WIDE_BITS, PackedWeight, check_kept
from slablm.packing.planes import (
    BITS_PER_BYTE,
    STATES_PER_BYTE,
    pack_states,
    packed_width,
    unpack_bits,
    unpack_states,
)
from slablm.packing.spec import StoredSpec

LARGEST_BITS = 7
GRID_DTYPE = torch.float16


@dataclass(frozen=True)
class CodedSpec(StoredSpec):
    """What is stored of a weight whose kept entries lie on a grid; it has rank 1 and signs.

    Attributes:
        out_features: m.
        in_features: n.
        kept: entries k kept in each row.
        bits: b, bits of a code.
        group_size: columns that share a scale.
        factor_dtype: type of u and v.
        grid_dtype: type that magnitudes are rounded to.
    """

    out_features: int
    in_features: int
    kept: int
    bits: int
    group_size: int
    factor_dtype: torch.dtype
    grid_dtype: torch.dtype = GRID_DTYPE

    @property
    def sign_in_code(self) -> bool:
        """Whether codes carry the signs of kept entries."""
        n, k, b = self.in_features, self.kept, self.bits
        in_codes = packed_width(n, STATES_PER_BYTE) + packed_width(k * (b + 1), BITS_PER_BYTE)
        return in_codes <= 2 * packed_width(n, BITS_PER_BYTE) + packed_width(k * b, BITS_PER_BYTE)

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor in a file, by name."""
        m, n = self.out_features, self.in_features
        states, bitmap = ((m, packed_width(n, per_byte)) for per_byte in (STATES_PER_BYTE, BITS_PER_BYTE))
        planes = {"states": states} if self.sign_in_code else {"positions": bitmap, "signs": bitmap}
        return {
            "codes": ((m, packed_width(self.kept * (self.bits + self.sign_in_code), BITS_PER_BYTE)), torch.uint8),
            "scales": ((m, -(-n // self.group_size)), torch.float16),
            "offsets": ((m,), torch.float16),
            "left": ((m, 1), self.factor_dtype),
            "right": ((1, n), self.factor_dtype),
            **{name: (shape, torch.uint8) for name, shape in planes.items()},
        }

    @property
    def paper_bits(self) -> int:
        """Bits in the paper's accounting: positions are free."""
        m, n = self.out_features, self.in_features
        numbers = m * (-(-n // self.group_size) + 1) + m + n
        return self.bits * m * self.kept + WIDE_BITS * numbers + m * n

    def from_parts(self, parts: Mapping[str, Tensor], name: str = "weight") -> PackedWeight:
        """The same weight with 16-bit values.

        Args:
            parts: the tensors in a file.
            name: how errors call this weight.

        Raises:
            SlabError: a row that does not keep k entries, or factors that the values' type cannot hold.
        """
        codes = _unpack_codes(parts["codes"], self.bits + self.sign_in_code, self.kept)
        if self.sign_in_code:
            plane = parts["states"]
            mask = unpack_states(plane, self.in_features) == 0
            check_kept(mask.sum(dim=1), self.kept, name)
            negative, codes = (codes >> self.bits).bool(), codes & (2**self.bits - 1)
        else:
            mask, signs = (unpack_bits(parts[part], self.in_features) for part in ("positions", "signs"))
            check_kept(mask.sum(dim=1), self.kept, name)
            plane, negative = pack_states(mask, signs), signs[mask].view(codes.shape)
        scales = parts["scales"].float().gather(1, kept_columns(mask, self.kept) // self.group_size)
        magnitudes = scales * (parts["offsets"].float()[:, None] + codes)
        values = torch.where(negative, -magnitudes, magnitudes).to(self.grid_dtype)
        left, right = _in_type(parts["left"], parts["right"], self.grid_dtype, name)
        return PackedWeight(self.in_features, values, left, right, plane, signs=True)


def _unpack_codes(packed: Tensor, bits: int, k: int) -> Tensor:
    """[m, ⌈k · bits / 8⌉] uint8 → [m, k] uint8."""
    shifts = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    single = unpack_bits(packed, k * bits).view(len(packed), k, bits)
    return (single.to(torch.uint8) << shifts).sum(dim=2, dtype=torch.uint8)


def _in_type(left: Tensor, right: Tensor, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
    """Factors in the values' type, up to a power of two between them: every product stays as it was.

    Raises:
        SlabError: they have numbers too far apart.
    """
    if left.dtype == dtype:
        return left, right
    wide = left.float(), right.float()
    largest = [part.abs().amax() for part in wide]
    if all(largest):  # zeros have no size to be shifted to
        shift = torch.exp2(((largest[1] / largest[0]).log2() / 2).round())
        wide = wide[0] * shift, wide[1] / shift
    narrow = wide[0].to(dtype), wide[1].to(dtype)
    if not all(torch.equal(a, b.float()) for a, b in zip(wide, narrow, strict=True)):
        raise SlabError(f"{name}: factors of an older format that {dtype} cannot hold: compress the dense model again")
    return narrow
