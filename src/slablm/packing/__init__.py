"""`Decomposition` ↔ packed tensors, bit-exact both ways."""

from slablm.packing.packed import GRID_PARTS, PackedSpec, PackedWeight, pack

# Of FORMAT.md: what is written, and what can be read. Version 2 added values in few bits, 3 errors on unseen text, and
# since 4 values on a grid are FP16 numbers in memory.
FORMAT_VERSION = 4
READABLE_VERSIONS = (1, 2, 3, 4)
FIRST_WITH_FP16_GRID = 4

__all__ = [
    "FIRST_WITH_FP16_GRID",
    "FORMAT_VERSION",
    "GRID_PARTS",
    "READABLE_VERSIONS",
    "PackedSpec",
    "PackedWeight",
    "pack",
]
