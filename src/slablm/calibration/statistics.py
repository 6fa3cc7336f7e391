"""What is kept of the inputs of a linear layer.

Of inputs X, [tokens, n], a collector accumulates over the windows

    d_j = ‖X[:, j]‖₂      (all methods)          XᵀX      (methods with error feedback)

(the latter perhaps twice: for the windows that are fitted, and for some that are kept back)

and keeps a few randomly chosen rows of X for measuring the output error; of further windows, which calibrate nothing,
it keeps such rows alone. The squares of every call are summed in float64 on their own, and these sums added up at the
end in the order of the windows, whichever rank ran them; XᵀX is added up pairwise (`slablm.calibration.pairwise`). So
both are the same bits for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from slablm.calibration.pairwise import PairwiseSum
from slablm.errors import SlabError
from slablm.methods import LayerStats

SAMPLED_TOKENS = 512


class Use(Enum):
    """What a window is there for."""

    FIT = "gram"
    HOLD_BACK = "held_out"
    MEASURE = "unseen"


def rows_per_window(windows: int) -> int:
    """Rows that are sampled of each of some windows."""
    return -(-SAMPLED_TOKENS // windows) if windows else 0


class _Rows:
    """Rows of a layer's inputs.

    Args:
        samples: how many are expected. Their place is taken at once: pieces kept one by one between larger tensors that
            come and go would scatter over the heap, and what lies around them could not be given back.
        in_features: n.
        device: where they are kept.
    """

    def __init__(self, samples: int, in_features: int, device: torch.device) -> None:
        self._rows, self._kept = torch.empty(samples, in_features, device=device), 0

    def add(self, rows: Tensor) -> None:
        """Keep rows, [s, n]."""
        start, self._kept = self._kept, self._kept + len(rows)
        if self._kept > len(self._rows):  # a layer that runs several times per window
            self._rows = torch.cat([self._rows, self._rows.new_empty(self._kept, self._rows.shape[1])])
        self._rows[start : self._kept] = rows

    def all(self) -> Tensor:
        """All rows so far, [s, n]."""
        return self._rows[: self._kept]


class StatsCollector:
    """Accumulates the `LayerStats` of one linear layer.

    Args:
        in_features: n.
        with_gram: whether XᵀX is wanted.
        device: where the layer runs.
        samples: rows of X that will be kept of the windows that calibrate, and of those that do not.
    """

    def __init__(
        self, in_features: int, with_gram: bool, device: torch.device, samples: tuple[int, int] = (SAMPLED_TOKENS, 0)
    ) -> None:
        self._squares: list[Tensor] = []
        self._with_gram = with_gram
        self._sums = {use: PairwiseSum() for use in (Use.FIT, Use.HOLD_BACK)}
        self._sample, self._unseen = (_Rows(count, in_features, device) for count in samples)
        self._window: tuple[Use, int] | None = None
        self._gram: Tensor | None = None
        self._tokens = self._fitted = 0

    def add(self, inputs: Tensor, sampled: Tensor, window: int = 0, use: Use = Use.FIT) -> None:
        """Add the inputs of one call.

        Args:
            inputs: [..., n].
            sampled: numbers, modulo the rows, of those kept for the output error.
            window: which window they are from, counted over all ranks; all calls of one come in a row.
            use: what the window is there for.
        """
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if not len(rows):  # nothing was sent to it this time
            return
        (self._unseen if use is Use.MEASURE else self._sample).add(rows[sampled.to(rows.device) % rows.shape[0]])
        if use is Use.MEASURE:
            return
        self._squares.append(rows.square().sum(dim=0, dtype=torch.float64))
        self._tokens += rows.shape[0]
        self._fitted += rows.shape[0] if use is Use.FIT else 0
        if not self._with_gram:
            return
        if self._window != (use, window):
            self._finish_window()
            self._window = use, window
        self._gram = rows.T @ rows if self._gram is None else self._gram.addmm_(rows.T, rows)

    def part(self) -> Part:
        """What there is so far; the collector is not to be used any more."""
        self._finish_window()
        sums = {(use, *node): value for use, tree in self._sums.items() for node, value in tree.nodes.items()}
        squares = torch.stack(self._squares) if self._squares else None
        return Part(self._tokens, self._fitted, squares, self._sample.all(), self._unseen.all(), sums)

    def stats(self, name: str) -> LayerStats | None:
        """The statistics of all that was added; see `joined`."""
        return joined(name, [self.part()])

    def _finish_window(self) -> None:
        if self._window is not None and self._gram is not None:
            use, window = self._window
            self._sums[use].add((0, window), self._gram)
        self._window = self._gram = None


@dataclass(frozen=True)
class Part:
    """What one collector has seen.

    Attributes:
        tokens: number of rows of X that calibrate.
        fitted: those of them that are fitted, not kept back.
        squares: of each call Σ x², [calls, n] float64; None if there was no call.
        sample: rows of X, [s, n].
        unseen: rows of windows that do not calibrate, [s, n].
        sums: parts of XᵀX, [n, n], by use and the node of `PairwiseSum`.
    """

    tokens: int
    fitted: int
    squares: Tensor | None
    sample: Tensor
    unseen: Tensor
    sums: dict[tuple[Use, int, int], Tensor]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All tensors by names that `from_tensors` understands."""
        named = {"sample": self.sample, "unseen": self.unseen}
        named |= {} if self.squares is None else {"squares": self.squares}
        named |= {f"{use.value} {level} {place}": value for (use, level, place), value in self.sums.items()}
        return {f"{prefix} {name}": tensor for name, tensor in named.items()}

    @classmethod
    def from_tensors(cls, counts: tuple[int, int], tensors: dict[str, Tensor], prefix: str) -> Part:
        """Inverse of `tensors` and of `tokens` and `fitted`; others with another prefix may be among them."""
        named = {name.removeprefix(f"{prefix} "): t for name, t in tensors.items() if name.startswith(f"{prefix} ")}
        sample, unseen, squares = named.pop("sample"), named.pop("unseen"), named.pop("squares", None)
        nodes = {name: name.split() for name in named}
        sums = {(Use(use), int(level), int(place)): named[name] for name, (use, level, place) in nodes.items()}
        return cls(*counts, squares, sample, unseen, sums)


def joined(name: str, parts: Sequence[Part]) -> LayerStats | None:
    """Statistics of one layer from what several collectors saw; their tensors are used up.

    Args:
        name: how errors call the layer.
        parts: of each collector, in the order of the windows.

    Returns:
        The statistics; None if no token that is fitted was among the inputs.

    Raises:
        SlabError: NaN or Inf among the inputs.
    """
    if not any(part.fitted for part in parts):
        return None
    calls = [row for part in parts if part.squares is not None for row in part.squares]
    squares = torch.zeros_like(calls[0])
    for row in calls:  # one after the other: no other order gives the same bits
        squares += row
    if not torch.isfinite(squares).all():
        raise SlabError(f"NaN or Inf in the inputs of layer {name}: check the weights, or use --dtype float32")
    trees = {use: PairwiseSum() for use in (Use.FIT, Use.HOLD_BACK)}
    for part in parts:
        for (use, level, place), value in part.sums.items():
            # Ranks may have shared collectors differently: a part can be asked for twice then.
            trees[use].add((level, place), value.clone() if len(parts) > 1 else value)
    sample, unseen = (torch.cat(rows) for rows in zip(*((p.sample, p.unseen) for p in parts), strict=True))
    return LayerStats(
        squares.sqrt().float(),
        sum(part.tokens for part in parts),
        sample,
        trees[Use.FIT].total(),
        trees[Use.HOLD_BACK].total(),
        unseen if len(unseen) else None,
    )
