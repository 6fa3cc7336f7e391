"""`SymbolWeight` ↔ packed tensors: symbols in tiles (`tiles`), scales in FP16, levels in 8 bits. See FORMAT.md.

Nothing is rounded here: a `SymbolWeight` has the numbers that are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slablm.errors import SlabError
from slablm.methods.rotation import Rotation
from slablm.methods.symbols import SymbolWeight
from slablm.packing.spec import StoredSpec
from slablm.packing.tiles import pack_tiles, tiled_shape, unpack_tiles


@dataclass(frozen=True)
class SymbolSpec(StoredSpec):
    """All that is needed to allocate and read a weight in symbols.

    Attributes:
        out_features: m.
        in_features: n.
        bits: p, bits of a symbol, 2 to 6.
        rotation: of the inputs, if there is one.
    """

    out_features: int
    in_features: int
    bits: int
    rotation: Rotation | None = None

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor in a file, by name."""
        m, n = self.out_features, self.in_features
        return {
            "symbols": (tiled_shape(m, n, self.bits), torch.uint8),
            "scales": ((m,), torch.float16),
            "levels": ((2**self.bits,), torch.int8),
        }

    @property
    def paper_bits(self) -> int:
        """Bits in the paper's accounting: as `nbytes` counts, without padding."""
        return self.bits * self.out_features * self.in_features + 16 * self.out_features + (8 << self.bits)

    def from_parts(self, parts: Mapping[str, Tensor], name: str = "weight") -> PackedSymbols:
        """Put together what `PackedSymbols.parts` took apart; see `PackedSymbols.validate`."""
        return PackedSymbols(self, *(parts[part] for part in self.parts()))


@dataclass(frozen=True)
class PackedSymbols:
    """A weight in symbols as it is stored.

    Attributes:
        spec: shapes and the like.
        symbols: in tiles, uint8.
        scales: s, [m] float16.
        levels: q, [2^p] int8.
    """

    spec: SymbolSpec
    symbols: Tensor
    scales: Tensor
    levels: Tensor

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
        codes = unpack_tiles(self.symbols, spec.bits, spec.out_features, spec.in_features)
        return SymbolWeight(codes, self.scales, self.levels, spec.rotation)

    def dense(self) -> Tensor:
        """Ŵ, [m, n] float32: the reference every kernel is compared with."""
        return self.unpack().dense()

    def validate(self, name: str) -> None:
        """Check what no shape tells.

        Args:
            name: how the error calls this weight.

        Raises:
            SlabError: a scale that is negative or not finite.
        """
        if not (torch.isfinite(self.scales) & (self.scales >= 0)).all():
            raise SlabError(f"{name}: corrupted scales (negative or not finite)")


def pack_symbols(weight: SymbolWeight) -> PackedSymbols:
    """Pack, on any device."""
    (m, n), bits = weight.shape, weight.symbol_bits
    spec = SymbolSpec(m, n, bits, weight.rotation)
    return PackedSymbols(spec, pack_tiles(weight.codes, bits), weight.scales.contiguous(), weight.levels.contiguous())
