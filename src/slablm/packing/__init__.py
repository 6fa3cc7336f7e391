"""`Decomposition` ↔ packed tensors, bit-exact both ways."""

from slablm.packing.packed import GRID_PARTS, PackedSpec, PackedWeight, pack

# Of FORMAT.md: what is written, and what can be read. Version 2 added values in few bits, 3 errors on unseen text.
FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)

__all__ = ["FORMAT_VERSION", "GRID_PARTS", "READABLE_VERSIONS", "PackedSpec", "PackedWeight", "pack"]
