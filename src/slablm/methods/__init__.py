"""The mathematics: tensors in, an approximation out. Nothing here knows of transformers, files or devices.

A method is a function ``(weight, stats, config) -> result``; `METHODS` names them all. A result has `shape`, `dense`
and `bits` (the paper's accounting). `Decomposition` can be packed and saved. `PrunedWeight` and `QuantizedWeight` come
from baselines that are only compared; they also know their `true_bits`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods.ablation import LOWRANK_RANK, sparse, sparse_lowrank, sparse_scalar_binary
from slablm.methods.budget import RowBudget, kept_per_row
from slablm.methods.decomposition import Decomposition, LayerStats
from slablm.methods.pruning import magnitude, wanda
from slablm.methods.quantizers import gptq, rtn
from slablm.methods.results import PrunedWeight, QuantizedWeight
from slablm.methods.slab import slab
from slablm.methods.slab_plus import possible_forms, slab_plus
from slablm.methods.sparsegpt import sparsegpt

Result = Decomposition | PrunedWeight | QuantizedWeight
Method = Callable[[Tensor, LayerStats, CompressionConfig], Result]

METHODS: dict[str, Method] = {
    "slab": slab,
    "slab+": slab_plus,
    "wanda": wanda,
    "magnitude": magnitude,
    "sparsegpt": sparsegpt,
    "rtn": rtn,
    "gptq": gptq,
    "sparse": sparse,
    "sparse+lowrank": sparse_lowrank,
    "sparse+scalar-binary": sparse_scalar_binary,
}

# Methods that need `LayerStats.gram`, which costs n² memory and a matrix product per batch to collect.
NEEDS_GRAM = frozenset({"sparsegpt", "gptq", "slab+"})
# Methods that need `LayerStats.held_out` as well: some windows are kept back for it.
NEEDS_HELD_OUT = frozenset({"slab+"})
# Baselines for comparison only: their results have no packed form.
YARDSTICKS = frozenset({"sparsegpt", "rtn", "gptq"})

__all__ = [
    "METHODS",
    "NEEDS_GRAM",
    "NEEDS_HELD_OUT",
    "YARDSTICKS",
    "Decomposition",
    "LayerStats",
    "Method",
    "PrunedWeight",
    "QuantizedWeight",
    "Result",
    "RowBudget",
    "get_method",
    "row_budget",
]


def get_method(name: str) -> Method:
    """Look a method up.

    Raises:
        SlabError: there is none of that name.
    """
    if name not in METHODS:
        raise SlabError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def row_budget(shape: tuple[int, int], config: CompressionConfig) -> RowBudget:
    """What a packable method stores of a weight: it depends on the shape alone.

    Only with a budget in true bits does `slab+` also look at the weight; all that it may choose take as many bytes, up
    to rounding, and the first of these is returned.

    Args:
        shape: (m, n) of the weight.
        config: `method`, `ratio` or `bits_per_weight`, `pattern`, `rank` and `magnitude_bits`.

    Raises:
        SlabError: the ratio leaves no entry, or the pattern does not divide n.
    """
    if config.method == "slab+":
        form = possible_forms(shape, config)[0]
        return RowBudget(form.kept, 1, signs=True, bits=form.bits)
    if config.method in ("slab", "sparse+scalar-binary"):
        rank, signs = (min(config.rank, *shape) if config.method == "slab" else 1), True
    else:
        rank, signs = (LOWRANK_RANK if config.method == "sparse+lowrank" else 0), False
    return RowBudget(kept_per_row(shape, config, rank, signs), min(rank, *shape), signs)
