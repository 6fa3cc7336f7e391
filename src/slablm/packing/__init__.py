"""`Decomposition` ↔ packed tensors, bit-exact both ways."""

from slablm.packing.packed import GRID_PARTS, PackedSpec, PackedWeight, pack

# Of FORMAT.md: what is written, and what can be read. Version 2 added values in few bits.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)

__all__ = ["FORMAT_VERSION", "GRID_PARTS", "READABLE_VERSIONS", "PackedSpec", "PackedWeight", "pack"]
