"""8-bit values: symmetric integers with one scale per row.

    ŵ = s_i q,    q ∈ {−127 … 127},    s_i = max |values of row i| / 127

Round to nearest, ties to even. −128 is not used, so that |q| fits into 7 bits: the kernels multiply pairs of 8-bit
numbers into 16 bits and must not overflow. See "8-bit values" in FORMAT.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def quantize_values(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round the kept values of every row to 8 bits.

    Args:
        values: [m, k], any float type.

    Returns:
        q, [m, k] int8, and the scales s, [m] float32 (1 for a row of zeros).
    """
    values = values.float()
    largest = values.abs().amax(dim=1)
    scales = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    return (values / scales[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scales
