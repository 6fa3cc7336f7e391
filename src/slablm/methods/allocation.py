"""Uneven budgets: how many bits each layer of a block gets.

Rate-distortion theory says how the output error of a layer depends on its bits b per weight. With n inputs of
correlation H = XᵀX / tokens, coding each of m rows of variance σ² with error feedback costs

    D(b) ∝ m n σ² det(H)^{1/n} 2^{−ρ b}

(the transform-coding gain: error feedback does as well as coding the inputs' principal components, whose mean in
logarithms is det(H)^{1/n}; Chen et al. 2025, "The geometry of LLM quantization", arXiv 2507.18553, says the same of
GPTQ as Babai's nearest plane). The ideal ρ is 2. SLaB's form spends bits on positions, and ρ = `RATE` fits what was
measured. On SmolLM2's layers the formula, with H damped as the sweep has it, predicts the measured error of a block's
layers among each other within 9 % (root mean square).

What an error does to the block is its sensitivity s (`slablm.calibration.sensitivity`). Minimising Σ s D at a given
total Σ m n b asks for equal s D per weight in all layers:

    b_l = level + log₂ (s_l σ_l² det(H_l)^{1/n_l}) / ρ

within the bounds of each layer, where the level is what meets the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slablm.methods.sweep import inverse_factor

# log₂ of the factor by which a layer's squared output error falls with each bit per weight; measured on SmolLM2 between
# 2.5 and 4.5 bits.
RATE = 1.6
_HALVINGS = 60


@dataclass(frozen=True)
class Demand:
    """What a layer asks for.

    Attributes:
        weights: m · n.
        importance: log₂ of s σ² det(H)^{1/n}; only differences between layers matter.
        least: fewest bits per weight it can have.
        most: most bits per weight it can use.
    """

    weights: int
    importance: float
    least: float
    most: float


def allot(budget: float, demands: Sequence[Demand]) -> list[float]:
    """Bits per weight of every layer.

    Args:
        budget: mean bits per weight, weighted by the number of weights; where no level within all bounds meets it, as
            much of it as the bounds allow.
        demands: of the layers.
    """

    def at(level: float) -> list[float]:
        return [min(max(level + d.importance / RATE, d.least), d.most) for d in demands]

    total = budget * sum(d.weights for d in demands)
    low = min(d.least - d.importance / RATE for d in demands)
    high = max(d.most - d.importance / RATE for d in demands)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        spent = sum(bits * d.weights for bits, d in zip(at(middle), demands, strict=True))
        low, high = (middle, high) if spent <= total else (low, middle)
    return at(low)


def log_error(weight: Tensor, gram: Tensor) -> float:
    """Log₂ (σ² det(G)^{1/n}): the output error per weight at equal bits, up to what all layers share.

    Args:
        weight: W, [m, n].
        gram: G = XᵀX, [n, n]; damped as in the sweep.

    Raises:
        SlabError: the Gram matrix is not finite, or cannot be factored.
    """
    variance = max(weight.float().square().mean().item(), torch.finfo(torch.float32).tiny)  # of a layer of zeros
    return math.log2(variance) - 2 * inverse_factor(gram.float()).diagonal().log2().mean().item()
