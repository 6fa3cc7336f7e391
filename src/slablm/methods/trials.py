"""What is decided by trial: on a few rows of a weight, by their error on tokens that were held back.

With G = XᵀX the output error ‖(W − Ŵ) Xᵀ‖²_F of a weight is tr (W − Ŵ) G (W − Ŵ)ᵀ, a sum over its rows. So some
rows, drawn at random, tell which of two ways is better at a fraction of the cost; and with G of tokens that nothing was
fitted to they tell it honestly.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLED_ROWS = 64


def trial_rows(m: int, seed: int) -> Tensor:
    """Which of m rows the trials look at: `SAMPLED_ROWS` of them at random, or all; ascending, int64 on the CPU.

    Not every so many-th row: a stride that divides the size of a head finds the same channel of all heads, in a q_proj
    one pair of the rotary embedding.
    """
    # A generator of its own, on the CPU: the same rows on every device and every rank.
    return torch.randperm(m, generator=torch.Generator().manual_seed(seed))[:SAMPLED_ROWS].sort().values


def output_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """Tr (W − Ŵ) G (W − Ŵ)ᵀ.

    Args:
        weight: W, [m, n] float32.
        approximation: Ŵ, [m, n] float32.
        gram: G, [n, n].
    """
    difference = weight - approximation
    return ((difference @ gram.to(weight)) * difference).sum().item()
