"""`Decomposition` ↔ packed tensors, bit-exact both ways."""

from slablm.packing.packed import PackedSpec, PackedWeight, pack

__all__ = ["PackedSpec", "PackedWeight", "pack"]
