"""The one table of methods: name → what it computes, and all that the rest of the program has to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods.ablation import LOWRANK_RANK, sparse, sparse_lowrank, sparse_scalar_binary
from slablm.methods.awq import awq
from slablm.methods.budget import RowBudget, SymbolBudget, kept_per_row, symbol_budget
from slablm.methods.decomposition import Decomposition, LayerStats
from slablm.methods.pruning import magnitude, wanda
from slablm.methods.quantizers import gptq, gptq_plain, rtn, rtn_plain
from slablm.methods.results import PrunedWeight, QuantizedWeight
from slablm.methods.slab import slab
from slablm.methods.slab_plus import slab_plus
from slablm.methods.sparsegpt import sparsegpt
from slablm.methods.symbols import SymbolWeight

Result = Decomposition | PrunedWeight | QuantizedWeight | SymbolWeight
Budget = Callable[[tuple[int, int], CompressionConfig], RowBudget | SymbolBudget]


def _alternating_workspace(gathered: float, float32: bool) -> float:
    """W, both backgrounds, the residual and the scores in float32, the mask, and the matrix to gather from."""
    return max(29, 25 + gathered)  # or one more float32 matrix, and nothing gathered yet


def _pruner_workspace(gathered: float, float32: bool) -> float:
    """Scores and mask; W in float32 unless it is, and then scores are often equal: resolving that takes 18 bytes."""
    return 5 + gathered if float32 else max(18, 9 + gathered)


def _slab_plus_workspace(gathered: float, float32: bool) -> float:
    """W rotated and transposed, symbols, what they stand for, errors, products with G: measured less closely."""
    return 60


@dataclass(frozen=True)
class Method:
    """A method and its traits.

    Attributes:
        function: (weight [m, n], stats, config) → result.
        budget: what is stored of a weight of shape (m, n); None for a yardstick, whose result has no packed form.
        needs_gram: whether it needs `LayerStats.gram`, which takes n² memory and a matrix product per batch.
        needs_held_out: whether it needs `LayerStats.held_out` as well: some windows are kept back for it.
        quantizes: whether its size comes from `value_bits` and `group_size`; ratio and pattern mean nothing to it.
        takes_true_bits: whether its size can be given by `bits_per_weight`.
        kept_matrices: n × n float32 matrices that it keeps while there are more layers with the same inputs
            (`LayerStats.once`).
        version: raised whenever a change of the method changes its results: they are then measured again.
        workspace: bytes per weight beside the weight at its peak, which is at its end, where the kept entries are
            gathered, from the bytes that this gathering takes and whether the model is in float32.
    """

    function: Callable[[Tensor, LayerStats, CompressionConfig], Result]
    budget: Budget | None = None
    needs_gram: bool = False
    needs_held_out: bool = False
    quantizes: bool = False
    takes_true_bits: bool = False
    kept_matrices: int = 0
    version: int = 1
    workspace: Callable[[float, bool], float] = _alternating_workspace

    @property
    def packable(self) -> bool:
        """Whether its result can be packed and saved; the others are only there to be compared with."""
        return self.budget is not None


def _rows_of(rank: int, signs: bool) -> Budget:
    """The budget of a method whose rank is fixed."""

    def budget(shape: tuple[int, int], config: CompressionConfig) -> RowBudget:
        return RowBudget(kept_per_row(shape, config, rank, signs), min(rank, *shape), signs)

    return budget


def _slab_rows(shape: tuple[int, int], config: CompressionConfig) -> RowBudget | SymbolBudget:
    return _rows_of(min(config.rank, *shape), signs=True)(shape, config)


def _slab_plus_symbols(shape: tuple[int, int], config: CompressionConfig) -> SymbolBudget:
    assert config.bits_per_weight is not None
    return symbol_budget(shape, config.bits_per_weight)


_PRUNED = _rows_of(0, signs=False)

METHODS: dict[str, Method] = {
    "slab": Method(slab, _slab_rows),
    "slab+": Method(
        slab_plus,
        _slab_plus_symbols,
        needs_gram=True,
        needs_held_out=True,
        takes_true_bits=True,
        kept_matrices=5,  # G rotated; the factors of both, with two dampings
        version=7,
        workspace=_slab_plus_workspace,
    ),
    "wanda": Method(wanda, _PRUNED, workspace=_pruner_workspace),
    "magnitude": Method(magnitude, _PRUNED, workspace=_pruner_workspace),
    "sparsegpt": Method(sparsegpt, needs_gram=True),
    "rtn": Method(rtn, quantizes=True, version=2),
    "gptq": Method(gptq, needs_gram=True, needs_held_out=True, quantizes=True, kept_matrices=2, version=2),
    "sparse": Method(sparse, _PRUNED, workspace=_pruner_workspace),
    "sparse+lowrank": Method(sparse_lowrank, _rows_of(LOWRANK_RANK, signs=False)),
    "sparse+scalar-binary": Method(sparse_scalar_binary, _rows_of(1, signs=True)),
    # At the end: a method's place is its colour in the plots.
    "awq": Method(awq, needs_gram=True, quantizes=True),
    "rtn-plain": Method(rtn_plain, quantizes=True),
    "gptq-plain": Method(gptq_plain, needs_gram=True, quantizes=True),
}


def get_method(name: str) -> Method:
    """Look a method up.

    Raises:
        SlabError: there is none of that name.
    """
    if name not in METHODS:
        raise SlabError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def storage(shape: tuple[int, int], config: CompressionConfig) -> RowBudget | SymbolBudget:
    """What a packable method stores of a weight: it depends on the shape alone.

    Args:
        shape: (m, n) of the weight.
        config: `method`, `ratio` or `bits_per_weight`, `pattern` and `rank`.

    Raises:
        SlabError: ratio or bits are too few, the pattern does not divide n, or the method is a yardstick.
    """
    budget = get_method(config.method).budget
    if budget is None:
        raise SlabError(f"method {config.method!r} has no packed format, it is a yardstick: see it in `slablm compare`")
    return budget(shape, config)
