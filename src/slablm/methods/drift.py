"""How far a compressed model's residual stream has drifted from the dense model's.

An error of a layer says how well its weight is approximated on the inputs it has. It does not say what becomes of that
error: how it adds up with those of the layers before, and how much of it the norms and blocks behind still see. A mean
of such errors does not rank methods. The drift looks at what is handed on. With H the hidden states behind a block of
the dense model and H' those of the compressed one on the same text, [tokens, hidden],

    drift = ‖H' − H‖_F / ‖H‖_F

The first token of a window stands apart. It carries the attention sink's massive activations, which would hide what
happens to all others (in SmolLM2, with windows of 1,024 tokens, 90 to 97 % of ‖H‖² behind blocks 11 to 20, and 3 %
behind the last).

Squares are summed up per window, in float64, and the windows' sums are added with one rounding (`math.fsum`): the total
is the same however windows are divided among ranks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

# Float64 copies of a whole window would be the largest tensors of a block.
_ROWS_AT_A_TIME = 64


class Squares(NamedTuple):
    """Sums of squares of one window: of the first token, and of all others.

    Attributes:
        first_change: ‖H' − H‖² of the first token.
        first: ‖H‖² of the first token.
        rest_change: ‖H' − H‖² of all others.
        rest: ‖H‖² of all others.
    """

    first_change: float
    first: float
    rest_change: float
    rest: float

    @classmethod
    def of(cls, dense: Tensor, compressed: Tensor) -> Squares:
        """Compare two windows.

        Args:
            dense: H, [tokens, hidden] or [1, tokens, hidden].
            compressed: H', of the same shape.
        """
        before, after = (states.detach().reshape(-1, states.shape[-1]).cpu() for states in (dense, compressed))
        return cls(*_sums(before[:1], after[:1]), *_sums(before[1:], after[1:]))


@dataclass(frozen=True)
class Drift:
    """Relative change of the hidden states behind one block, ‖H' − H‖_F / ‖H‖_F (0 where H is zero).

    Attributes:
        first: of the first token of every window.
        rest: of all other tokens.
    """

    first: float
    rest: float

    @classmethod
    def of(cls, windows: Collection[Squares]) -> Drift:
        """The drift over all windows together.

        Args:
            windows: at least one.
        """
        first_change, first, rest_change, rest = (math.fsum(sums) for sums in zip(*windows, strict=True))
        return cls(_ratio(first_change, first), _ratio(rest_change, rest))


def mean_drift(blocks: Sequence[Drift]) -> Drift:
    """Mean over blocks.

    Args:
        blocks: the drift behind every block, at least one.
    """
    return Drift(fmean(block.first for block in blocks), fmean(block.rest for block in blocks))


def _sums(before: Tensor, after: Tensor) -> tuple[float, float]:
    """‖after − before‖² and ‖before‖² of [tokens, hidden]."""
    change = size = 0.0
    for old, new in zip(*(torch.split(states, _ROWS_AT_A_TIME) for states in (before, after)), strict=True):
        wide = old.double()
        change += (new.double() - wide).square().sum().item()
        size += wide.square().sum().item()
    return change, size


def _ratio(change: float, size: float) -> float:
    return math.sqrt(change / size) if size > 0 else 0.0
