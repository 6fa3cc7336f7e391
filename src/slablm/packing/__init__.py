"""What methods return ↔ packed tensors, bit-exact both ways.

A *spec* says what is stored of a weight, and allocates and reads its parts, the tensors in a file. There are three:
`PackedSpec`, kept entries in 16 bits; `SymbolSpec`, one symbol per weight; and `CodedSpec`, which is only read.

May import: `methods`.
"""

import torch

from slablm.methods.decomposition import Decomposition
from slablm.methods.symbols import SymbolWeight
from slablm.packing.coded import GRID_DTYPE, CodedSpec
from slablm.packing.packed import PackedSpec, PackedWeight, pack_rows
from slablm.packing.symbols import PackedSymbols, SymbolSpec, pack_symbols

Spec = PackedSpec | SymbolSpec | CodedSpec
Packed = PackedWeight | PackedSymbols


def pack(result: Decomposition | SymbolWeight, value_dtype: torch.dtype, name: str = "weight") -> Packed:
    """Pack what a method has returned.

    Args:
        result: on any device.
        value_dtype: float16 or bfloat16, to which kept entries and factors are rounded; symbols have FP16 numbers.
        name: how errors call this weight.

    Raises:
        SlabError: a value does not fit into the type's range.
    """
    return pack_symbols(result) if isinstance(result, SymbolWeight) else pack_rows(result, value_dtype, name)


__all__ = [
    "GRID_DTYPE",
    "CodedSpec",
    "Packed",
    "PackedSpec",
    "PackedSymbols",
    "PackedWeight",
    "Spec",
    "SymbolSpec",
    "pack",
]
