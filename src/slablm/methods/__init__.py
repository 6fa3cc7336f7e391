"""The mathematics: tensors in, an approximation out. Nothing here knows of transformers, files or devices.

A method is a function ``(weight, stats, config) -> result``; the table `METHODS` (`slablm.methods.table`) names them
all, with their traits. A result has `shape`, `dense` and `bits` (the paper's accounting). `Decomposition` and
`SymbolWeight` can be packed and saved. `PrunedWeight` and `QuantizedWeight` come from baselines that are only compared;
they also know their `true_bits`.

May import: `slablm.config`, `slablm.errors`.
"""

from slablm.methods.budget import RowBudget, SymbolBudget
from slablm.methods.decomposition import Decomposition, LayerStats
from slablm.methods.results import PrunedWeight, QuantizedWeight
from slablm.methods.symbols import SymbolWeight
from slablm.methods.table import METHODS, Method, Result, get_method, storage

__all__ = [
    "METHODS",
    "Decomposition",
    "LayerStats",
    "Method",
    "PrunedWeight",
    "QuantizedWeight",
    "Result",
    "RowBudget",
    "SymbolBudget",
    "SymbolWeight",
    "get_method",
    "storage",
]
