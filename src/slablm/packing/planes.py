"""Two ways to store where the kept entries are, both row by row and byte-aligned.

- *Ternary states* {0: kept, 1: +, 2: −}, five to a byte as Σ tᵢ 3ⁱ (i = 0 is the leftmost): 3⁵ = 243 ≤ 256, so a
  weight costs 1.6 bits, against log₂ 3 = 1.585 at best. The 13 byte values from 243 on are not used.
- *Bitmap* of kept positions, eight to a byte, bit i of a byte is its i-th column: for weights without signs.

A row whose width is no multiple of 5 or 8 is filled up with state 1 (+) or bit 0, so that the number of kept entries
per row can still be counted on the packed bytes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

STATES_PER_BYTE = 5
BITS_PER_BYTE = 8
STATE_BYTE_LIMIT = 3**STATES_PER_BYTE
KEPT, PLUS, MINUS = 0, 1, 2


def packed_width(n: int, per_byte: int) -> int:
    """Bytes of a row of n."""
    return -(-n // per_byte)


def pack_states(mask: Tensor, signs: Tensor) -> Tensor:
    """Ternary states of a weight.

    Args:
        mask: kept positions, [m, n] bool.
        signs: [m, n] bool, True for −1; ignored where the mask is set.

    Returns:
        [m, ⌈n / 5⌉] uint8.
    """
    states = (PLUS + signs.to(torch.uint8)).masked_fill_(mask, KEPT)
    groups = _in_groups(states, STATES_PER_BYTE, fill=PLUS)
    packed = groups[..., -1].clone()
    for i in reversed(range(STATES_PER_BYTE - 1)):
        packed.mul_(3).add_(groups[..., i])
    return packed


def unpack_states(packed: Tensor, n: int) -> Tensor:
    """Inverse of `pack_states`: a sign factor per weight, 0 where kept.

    Args:
        packed: [m, ⌈n / 5⌉] uint8.
        n: width of a row.

    Returns:
        [m, n] float32 in {0, +1, −1}.
    """
    table = _sign_table(packed.device)
    return table[packed.int()].view(packed.shape[0], -1)[:, :n]


def pack_bits(mask: Tensor) -> Tensor:
    """Bitmap of a mask, [m, n] bool → [m, ⌈n / 8⌉] uint8."""
    groups = _in_groups(mask.to(torch.uint8), BITS_PER_BYTE, fill=0)
    return (groups << torch.arange(BITS_PER_BYTE, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """Inverse of `pack_bits`, [m, ⌈n / 8⌉] uint8 → [m, n] bool."""
    shifts = torch.arange(BITS_PER_BYTE, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).bool().flatten(1)[:, :n]


def _in_groups(tensor: Tensor, size: int, fill: int) -> Tensor:
    """[m, n] → [m, ⌈n / size⌉, size], filled up at the right."""
    m, n = tensor.shape
    return functional.pad(tensor, (0, -n % size), value=fill).view(m, -1, size)


@cache
def _sign_table(device: torch.device) -> Tensor:
    """Sign factors of the five states in every byte value, [256, 5] float32."""
    codes = torch.arange(256, device=device)[:, None] // 3 ** torch.arange(STATES_PER_BYTE, device=device) % 3
    return torch.tensor([0.0, 1.0, -1.0], device=device)[codes]
