"""`Decomposition` ↔ packed tensors, bit-exact both ways."""

from slablm.packing.packed import PackedSpec, PackedWeight, pack

# Of FORMAT.md; a reader refuses versions it does not know.
FORMAT_VERSION = 1

__all__ = ["FORMAT_VERSION", "PackedSpec", "PackedWeight", "pack"]
