"""What is kept of the inputs of a linear layer.

Of inputs X, [tokens, n], a collector accumulates over the windows

    d_j = ‖X[:, j]‖₂      (all methods)          XᵀX      (methods with error feedback)

(the latter perhaps twice: for the windows that are fitted, and for some that are kept back)

and keeps a few randomly chosen rows of X for measuring the output error; of further windows, which calibrate nothing,
it keeps such rows alone. The squares of every call are summed in float64 on their own, and these sums added up at the
end in the order of the windows, whichever rank ran them; XᵀX is added up pairwise (`slablm.calibration.pairwise`). So
both are the same bits for any number of ranks. What collectors of several ranks have seen of one layer is put together
piece by piece, on the rank that decomposes it (`Joint`).

XᵀX of bfloat16 inputs is a kernel's where the CPU has one (`slablm.runtime.kernels.gram`), else torch's in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import torch
from torch import Tensor

from slablm.calibration.pairwise import PairwiseSum
from slablm.errors import SlabError
from slablm.methods import LayerStats
from slablm.runtime.kernels import gram_kernel

SAMPLED_TOKENS = 512
# Narrower strips of XᵀX save no more.
_NARROWEST = 128


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
        alone: whether it sees all windows, those that are fitted before those that are kept back. Then XᵀX of the
            former is added up when the latter begin, and not kept in parts until the end.

    Attributes:
        tokens: rows of X so far that calibrate.
        fitted: those of them that are fitted, not kept back.
    """

    def __init__(
        self,
        in_features: int,
        with_gram: bool,
        device: torch.device,
        samples: tuple[int, int] = (SAMPLED_TOKENS, 0),
        alone: bool = False,
    ) -> None:
        self._squares: list[Tensor] = []
        self._with_gram, self._alone = with_gram, alone
        self._sums = {use: PairwiseSum() for use in (Use.FIT, Use.HOLD_BACK)}
        self._sample, self._unseen = (_Rows(count, in_features, device) for count in samples)
        self._leaf: tuple[Use, int] | None = None
        self._gram: Tensor | None = None
        self.tokens = self.fitted = 0

    def add(self, inputs: Tensor, sampled: Tensor, leaf: int = 0, use: Use = Use.FIT) -> None:
        """Add the inputs of one call.

        Args:
            inputs: [..., n].
            sampled: numbers, modulo the rows, of those kept for the output error.
            leaf: of the sum XᵀX; all calls of one come in a row.
            use: what their window is there for.
        """
        narrow = inputs.detach().reshape(-1, inputs.shape[-1])
        rows = narrow.float()
        if not len(rows):  # nothing was sent to it this time
            return
        (self._unseen if use is Use.MEASURE else self._sample).add(rows[sampled.to(rows.device) % rows.shape[0]])
        if use is Use.MEASURE:
            return
        self._squares.append(rows.square().sum(dim=0, dtype=torch.float64))
        self.tokens += rows.shape[0]
        self.fitted += rows.shape[0] if use is Use.FIT else 0
        if not self._with_gram:
            return
        if self._leaf != (use, leaf):
            self._finish_leaf()
            if self._alone and use is Use.HOLD_BACK:
                self._sums[Use.FIT].close()
            self._leaf = use, leaf
        if self._gram is None:
            self._gram = rows.new_zeros(rows.shape[1], rows.shape[1])
        add = gram_kernel(narrow)
        if add is None:
            add_upper(self._gram, rows)
        else:
            del rows  # the kernel takes half as much
            add(self._gram, narrow)

    def pieces(self) -> dict[str, Tensor]:
        """What there is so far, for `Joint.add`; the collector is not to be used any more."""
        self._finish_leaf()
        pieces = {"sample": self._sample.all(), "unseen": self._unseen.all()}
        if self._squares:
            pieces["squares"] = torch.stack(self._squares)
        for use, tree in self._sums.items():
            pieces |= {f"{use.value} {level} {place}": value for (level, place), value in tree.nodes.items()}
            tree.nodes.clear()
        return pieces

    def _finish_leaf(self) -> None:
        if self._leaf is not None and self._gram is not None:
            use, leaf = self._leaf
            mirror(self._gram)
            self._sums[use].add((0, leaf), self._gram)
        self._leaf = self._gram = None


def add_upper(gram: Tensor, rows: Tensor) -> None:
    """Add XᵀX where it is not below the diagonal; between the diagonal and the end of its strip it may be, too.

    XᵀX is symmetric, and products of strips with what is right of them take little more than half of the whole.

    Args:
        gram: [n, n].
        rows: X, [tokens, n].
    """
    for start, stop in _strips(len(gram)):
        gram[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def mirror(gram: Tensor) -> None:
    """Fill what is below the diagonal from what is above."""
    for start, stop in _strips(len(gram)):
        gram[stop:, start:stop] = gram[start:stop, stop:].T
        corner = gram[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)


def _strips(n: int) -> Iterator[tuple[int, int]]:
    """First row and end of every strip: an eighth of the rows, or `_NARROWEST`."""
    height = max(_NARROWEST, -(-n // 8))
    return ((start, min(start + height, n)) for start in range(0, n, height))


class Joint:
    """The statistics of one layer from what several collectors have seen."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[int, Tensor]] = {"squares": {}, "sample": {}, "unseen": {}}
        self._sums = {use: PairwiseSum() for use in (Use.FIT, Use.HOLD_BACK)}

    def add(self, collector: int, piece: str, value: Tensor) -> None:
        """Take one of the `StatsCollector.pieces`, in any order.

        Args:
            collector: its number, in the order of the windows.
            piece: its name.
            value: the piece, which is used up.
        """
        if piece in self._rows:
            self._rows[piece][collector] = value
        else:
            use, level, place = piece.split()
            self._sums[Use(use)].add((int(level), int(place)), value)

    def stats(self, name: str, tokens: int) -> LayerStats:
        """The statistics.

        Args:
            name: how errors call the layer.
            tokens: `StatsCollector.tokens` of all.

        Raises:
            SlabError: NaN or Inf among the inputs.
        """
        calls = [row for _, rows in sorted(self._rows["squares"].items()) for row in rows]
        squares = torch.zeros_like(calls[0])
        for row in calls:  # one after the other: no other order gives the same bits
            squares += row
        if not torch.isfinite(squares).all():
            raise SlabError(f"NaN or Inf in the inputs of layer {name}: check the weights, or use --dtype float32")
        sample, unseen = (
            torch.cat([rows for _, rows in sorted(self._rows[kind].items())]) for kind in ("sample", "unseen")
        )
        return LayerStats(
            squares.sqrt().float(),
            tokens,
            sample,
            self._sums[Use.FIT].total(),
            self._sums[Use.HOLD_BACK].total(),
            unseen if len(unseen) else None,
        )
