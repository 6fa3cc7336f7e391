"""8-bit values: symmetric integers with one scale per row.

    ŵ = s_i q,    q ∈ {−127 … 127},    s_i = max |values of row i| / 127

Round to nearest, ties to even. −128 is not used, so that |q| fits into 7 bits: the kernels multiply pairs of 8-bit
numbers into 16 bits and must not overflow. Kept values become that at run time (`quantize_values`), embedding and head
in files (`quantize_rows`); see "8-bit values" and "Int8 rows" in FORMAT.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slablm.errors import SlabError

LARGEST = 127
# `quantize_rows` works on pieces of this many entries.
ENTRIES_AT_ONCE = 1 << 22


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


def quantize_rows(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Round a matrix to int8 rows with FP16 scales.

    Scales are rounded up, so that nothing is clipped: max |row| ≤ 127 s_i. A row of zeros has scale 0.

    Args:
        weight: [m, n], any float type, finite; on the meta device only shapes are made.
        name: how errors call it.

    Returns:
        q, [m, n] int8, and the scales s, [m] float16, where the weight is.

    Raises:
        SlabError: a scale is beyond FP16.
    """
    m, n = weight.shape
    quantized = torch.empty(m, n, dtype=torch.int8, device=weight.device)
    scales = torch.empty(m, dtype=torch.float16, device=weight.device)
    step = max(1, ENTRIES_AT_ONCE // n)
    for begin in range(0, 0 if weight.is_meta else m, step):
        rows = weight.detach()[begin : begin + step].float()
        own = _scales_above(rows.abs().amax(dim=1))
        divisors = torch.where(own > 0, own, torch.ones_like(own)).float()
        scales[begin : begin + step] = own
        quantized[begin : begin + step] = (rows / divisors[:, None]).round_().to(torch.int8)
    if not weight.is_meta and not torch.isfinite(scales).all():
        raise SlabError(f"{name}: a value does not fit into int8 rows with FP16 scales: use --head-bits 16")
    return quantized, scales


def _scales_above(largest: Tensor) -> Tensor:
    """The least FP16 numbers s with 127 s ≥ largest, which is [m] float32 and not negative."""
    scales = (largest / LARGEST).half()
    too_small = LARGEST * scales.float() < largest  # 18 bits: exact
    return (scales.view(torch.int16) + too_small).view(torch.float16)  # the next number has the next bit pattern
