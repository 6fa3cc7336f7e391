"""`Decomposition` ↔ packed tensors, bit-exact both ways.

May import: `methods`.
"""

from slablm.packing.packed import GRID_DTYPE, GRID_PARTS, PackedSpec, PackedWeight, pack

__all__ = ["GRID_DTYPE", "GRID_PARTS", "PackedSpec", "PackedWeight", "pack"]
