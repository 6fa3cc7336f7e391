"""`SymbolWeight` ↔ packed tensors: symbols in tiles (`tiles`), and the alphabet in FP16. The layout is in FORMAT.md.

Nothing is rounded here: a `SymbolWeight` has the numbers that are stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slablm.errors import SlabError
from slablm.methods.alphabet import Alphabet, SymbolWeight, level_count
from slablm.methods.rotation import Rotation
from slablm.packing.spec import StoredSpec
from slablm.packing.tiles import pack_tiles, tiled_shape, unpack_tiles


@dataclass(frozen=True)
class SymbolSpec(StoredSpec):
    """All that is needed to allocate and read a weight in symbols.

    Attributes:
        out_features: m.
        in_features: n.
        bits: p, bits of a symbol, 2 to 5.
        group_size: columns that share a scale.
        rotation: of the inputs, if there is one.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int
    rotation: Rotation | None = None

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor in a file, by name."""
        m, n, half = self.out_features, self.in_features, torch.float16
        return {
            "symbols": (tiled_shape(m, n, self.bits), torch.uint8),
            "scales": ((m, -(-n // self.group_size)), half),
            "levels": ((level_count(self.bits),), half),
            "left": ((m, 1), half),
            "right": ((1, n), half),
        }

    @property
    def paper_bits(self) -> int:
        """Bits in the paper's accounting: as `nbytes` counts, without padding."""
        numbers = sum(math.prod(shape) for shape, dtype in self.parts().values() if dtype == torch.float16)
        return self.bits * self.out_features * self.in_features + 16 * numbers

    def from_parts(self, parts: Mapping[str, Tensor], name: str = "weight") -> PackedSymbols:
        """Put together what `PackedSymbols.parts` took apart; see `PackedSymbols.validate`."""
        return PackedSymbols(self, *(parts[part] for part in self.parts()))


@dataclass(frozen=True)
class PackedSymbols:
    """A weight in symbols as it is stored.

    Attributes:
        spec: shapes and the like.
        symbols: in tiles, uint8.
        scales: s, [m, ⌈n / group_size⌉] float16.
        levels: a, ascending, [2^(p−1) − 1] float16.
        left: u, [m, 1] float16.
        right: vᵀ, [1, n] float16.
    """

    spec: SymbolSpec
    symbols: Tensor
    scales: Tensor
    levels: Tensor
    left: Tensor
    right: Tensor

    @property
    def in_features(self) -> int:
        """Columns n."""
        return self.spec.in_features

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.symbols.device

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return self.spec.nbytes

    def parts(self) -> dict[str, Tensor]:
        """The tensors in a file, by name."""
        return {name: getattr(self, name) for name in self.spec.parts()}

    def unpack(self) -> SymbolWeight:
        """The weight that was packed."""
        spec = self.spec
        symbols = unpack_tiles(self.symbols, spec.bits, spec.out_features, spec.in_features)
        alphabet = Alphabet(self.left[:, 0], self.right[0], self.scales, self.levels, spec.group_size)
        top = 2 ** (spec.bits - 1)
        return SymbolWeight(symbols & (top - 1), symbols >= top, alphabet, spec.rotation)

    def dense(self) -> Tensor:
        """Ŵ, [m, n] float32: the reference every kernel is compared with."""
        return self.unpack().dense()

    def validate(self, name: str) -> None:
        """Check what no shape tells.

        Args:
            name: how the error calls this weight.

        Raises:
            SlabError: a number that is negative or not finite, or levels that do not ascend.
        """
        for part in (self.scales, self.levels, self.left, self.right):
            if not (torch.isfinite(part) & (part >= 0)).all():
                raise SlabError(f"{name}: corrupted scales, levels or factors (negative or not finite)")
        if (self.levels.diff() < 0).any():
            raise SlabError(f"{name}: corrupted levels (they do not ascend)")


def pack_symbols(weight: SymbolWeight) -> PackedSymbols:
    """Pack, on any device."""
    alphabet, (m, n) = weight.alphabet, weight.shape
    spec = SymbolSpec(m, n, weight.symbol_bits, alphabet.group_size, weight.rotation)
    symbols = pack_tiles(weight.symbols(), spec.bits)
    factors = alphabet.left[:, None], alphabet.right[None]
    return PackedSymbols(spec, symbols, *(p.contiguous() for p in (alphabet.scales, alphabet.levels, *factors)))
