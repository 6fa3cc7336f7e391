"""What is compared: the cells of a grid.

For the paper's Table I by default:

- the dense model;
- every pruning method, unstructured, at every ratio;
- every pruning method with every N:M pattern, at ratio 1 − N/M and no other. That is the ratio the pattern stands for:
  a plain pruner with 2:4 removes half of the weights whatever smaller ratio one asks for, and above it the pattern is
  hardly felt. So 2:4 and 4:8 are cells at 50 %, also when 0.5 is not among the ratios;
- `slab+` with every budget in true bits;
- every quantizer (`rtn`, `gptq`, `awq` and plain forms) with every number of bits and every group size; ratio and
  pattern mean nothing to it.

Each of them as often as there are draws of calibration windows, with one seed after the other. Beside the grid stand
rivals from files (`slablm.comparison.rivals`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from slablm.comparison.rivals import DENSE, Rival
from slablm.config import DEFAULT_BITS, CompressionConfig, Pattern
from slablm.errors import SlabError
from slablm.methods import get_method

FROM_FILE = "from a file"


@dataclass(frozen=True)
class Cell:
    """One point of the grid, or a model beside it.

    Attributes:
        config: method and settings; None for the dense model and for rivals.
        rival: a compressed model from a file.
    """

    config: CompressionConfig | None = None
    rival: Rival | None = None

    @property
    def dense(self) -> bool:
        """Whether it is the dense model."""
        return self.config is None and self.rival is None

    @property
    def method(self) -> str:
        """Name of the method or of the rival, ``dense`` for the dense model."""
        return self.config.method if self.config else self.rival.name if self.rival else DENSE

    @property
    def quantizes(self) -> bool:
        """Whether it is a rival or a point of bits × group size; ratio and pattern are the pruners'."""
        return self.rival is not None or (self.config is not None and get_method(self.config.method).quantizes)

    @property
    def setting(self) -> str:
        """What cells of different methods have in common when they are compared, such as ``50 % 2:4``."""
        if self.config is None:
            return FROM_FILE if self.rival else DENSE
        if self.quantizes:
            return f"{self.config.value_bits} bit, group {self.config.group_size}"
        if self.config.bits_per_weight is not None:
            return f"{self.config.bits_per_weight:g} bits"
        assert self.config.ratio is not None
        return f"{100 * self.config.ratio:.4g} % {self.config.pattern}"

    @property
    def label(self) -> str:
        """Method and setting, and the seed if it is not the first."""
        if self.config is None:
            return self.method
        return f"{self.method} {self.setting}" + (f", seed {self.config.seed}" if self.config.seed else "")

    @property
    def undrawn(self) -> Cell:
        """What it has in common with the same cell of another draw."""
        return self if self.config is None else Cell(replace(self.config, seed=0))


@dataclass(frozen=True)
class Grid:
    """What to compare.

    Args:
        methods: names of methods.
        ratios: the paper's compression ratios, of unstructured cells.
        patterns: ``unstructured`` and N:M patterns.
        value_bits: bits per code, of the quantizers.
        group_sizes: columns that share a scale, of the quantizers.
        budgets: true bits per weight, of `slab+`.
        draws: how often each cell is measured, with one draw of calibration windows after the other.
    """

    methods: tuple[str, ...]
    ratios: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)
    patterns: tuple[str, ...] = ("unstructured", "2:4", "4:8")
    value_bits: tuple[int, ...] = (3, 4, 8)
    group_sizes: tuple[int, ...] = (128,)
    budgets: tuple[float, ...] = (DEFAULT_BITS,)
    draws: int = 1

    def cells(self, base: CompressionConfig, *, alone: bool = True) -> list[Cell]:
        """All cells in the order they are measured: dense, then setting by setting, every method of it.

        Args:
            base: all other settings; its seed is that of the first draw.
            alone: whether no rivals stand beside them.

        Raises:
            SlabError: an unknown method, a ratio or pattern out of range, or nothing to measure.
        """
        known = {method: get_method(method) for method in self.methods}
        by_bits = [method for method, traits in known.items() if traits.takes_true_bits]
        quantizers = [method for method, traits in known.items() if traits.quantizes]
        pruners = [method for method in known if method not in (*by_bits, *quantizers)]
        base = replace(base, method=DENSE, ratio=None, bits_per_weight=None)  # each method has a size of its own kind
        grids = (
            (self._pruner_settings(), pruners),
            (self._quantizer_settings(), quantizers),
            (({"ratio": None, "bits_per_weight": bits} for bits in self.budgets), by_bits),
        )
        configs = [
            replace(base, method=method, **at) for settings, methods in grids for at in settings for method in methods
        ]
        if not configs and alone:
            raise SlabError("nothing to compare: name at least one method, and a ratio and pattern for it")
        # The same value given twice is one cell.
        configs = list(dict.fromkeys(configs))
        return [Cell(), *(Cell(replace(c, seed=base.seed + i)) for c in configs for i in range(self.draws))]

    def _pruner_settings(self) -> Iterator[dict[str, Any]]:
        for pattern in self.patterns:
            n_of_m = Pattern.parse(pattern)
            ratios = self.ratios if n_of_m is None else [1 - n_of_m.survivors / n_of_m.group]
            yield from ({"ratio": ratio, "pattern": pattern} for ratio in ratios)

    def _quantizer_settings(self) -> Iterator[dict[str, Any]]:
        return ({"value_bits": bits, "group_size": size} for bits in self.value_bits for size in self.group_sizes)
