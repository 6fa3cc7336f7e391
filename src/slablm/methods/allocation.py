"""Uneven budgets: how many bits the symbols of each layer of a block have.

Rate-distortion theory says how the output error of a layer depends on its bits b per weight. With n inputs of
correlation H = XᵀX / tokens, coding each of m rows of variance σ² with error feedback costs

    D(b) ∝ m n σ² det(H)^{1/n} 2^{−ρ b}

(the transform-coding gain: error feedback does as well as coding the inputs' principal components, whose mean in
logarithms is det(H)^{1/n}; Chen et al. 2025, "The geometry of LLM quantization", arXiv 2507.18553, says the same of
GPTQ as Babai's nearest plane), with ρ = 2 at best, and about that was measured with symbols. On SmolLM2's layers the
formula, with H damped as the sweep has it, predicts the measured error of a block's layers among each other within 9 %
(root mean square).

What an error does to the block is its sensitivity s (`slablm.calibration.sensitivity`). Σ s D is to be as small as
possible within a total Σ m n b. Symbols have whole numbers of bits, and each bit helps less than the one before: so
layers begin with the fewest, and whichever gains most per bit that it takes gets one more, until nothing fits any more.
Blocks come one after the other; what one of them leaves over, because no step fits any more, the next one may have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor

from slablm.errors import SlabError
from slablm.methods.budget import SYMBOL_BITS, symbol_bytes
from slablm.methods.sweep import factored

# log₂ of the factor by which a layer's squared output error falls with each bit of a symbol.
RATE = 2.0


@dataclass(frozen=True)
class Demand:
    """What a layer asks for.

    Attributes:
        weights: m · n.
        importance: log₂ of s σ² det(H)^{1/n}; only differences between layers matter.
        sizes: true bits per weight with symbols of 2, 3, 4, 5 and 6 bits, ascending.
    """

    weights: int
    importance: float
    sizes: tuple[float, ...]

    @classmethod
    def of(cls, shape: tuple[int, int], importance: float = 0.0) -> Demand:
        """Of a layer of shape (m, n)."""
        m, n = shape
        sizes = tuple(8 * symbol_bytes(shape, bits) / (m * n) for bits in SYMBOL_BITS)
        return cls(m * n, importance, sizes)


def allot(budget: float, demands: Sequence[Demand]) -> list[int]:
    """Which of its sizes every layer gets.

    Args:
        budget: the most bits per weight that they may have together.
        demands: of the layers; of equal ones the first gets more.

    Raises:
        SlabError: even the smallest sizes are too large.
    """
    chosen = [0] * len(demands)
    total = sum(d.weights for d in demands)
    left = budget * total * (1 + 1e-9) - sum(d.weights * d.sizes[0] for d in demands)
    if left < 0:
        least = sum(d.weights * d.sizes[0] for d in demands) / total
        raise SlabError(f"{budget:g} bits per weight are too few: use at least {math.ceil(100 * least) / 100}")

    def cost(i: int) -> float:
        return demands[i].weights * (demands[i].sizes[chosen[i] + 1] - demands[i].sizes[chosen[i]])

    def gain(i: int) -> float:
        """Up to the same for all: log₂ of the fall of Σ s D per bit."""
        demand = demands[i]
        return demand.importance - RATE * chosen[i] - math.log2(cost(i) / demand.weights)

    # A block may have hundreds of layers (experts). What does not fit once never will: less and less is left.
    best_first = [(-gain(i), i) for i, d in enumerate(demands) if len(d.sizes) > 1]
    heapify(best_first)
    while best_first:
        _, best = heappop(best_first)
        if cost(best) > left:
            continue
        left -= cost(best)
        chosen[best] += 1
        if chosen[best] + 1 < len(demands[best].sizes):
            heappush(best_first, (-gain(best), best))
    return chosen


class Allowance:
    """A budget of a model, handed out block by block.

    Args:
        budget: the most bits per weight that all blocks up to any of them may have together.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self._saved = 0.0

    def allot(self, demands: Sequence[Demand]) -> list[int]:
        """As the function: sizes of a block's layers. `spend` must follow before the next block's turn.

        Raises:
            SlabError: even the smallest sizes are too large.
        """
        return allot(self.budget + self._saved / max(1, sum(d.weights for d in demands)), demands)

    def spend(self, weights: int, bits: float) -> None:
        """Note what a block took.

        Args:
            weights: of its layers.
            bits: that they are stored in.
        """
        self._saved += self.budget * weights - bits


def log_variance(weight: Tensor) -> float:
    """Log₂ σ² of W, [m, n]; with `log_volume` of its inputs the output error per weight at equal bits.

    The logarithm of σ² det(G)^{1/n}, that is, up to what all layers share.
    """
    return math.log2(max(weight.float().square().mean().item(), torch.finfo(torch.float32).tiny))  # zeros have some


def log_volume(gram: Tensor) -> float:
    """Log₂ det(G)^{1/n}.

    Args:
        gram: G = XᵀX, [n, n]; damped as in the sweep.

    Raises:
        SlabError: the Gram matrix is not finite, or cannot be factored.
    """
    return 2 * factored(gram).triangle.diagonal().log2().mean().item()
