"""Few-bit values in a file: `ValueGrid` codes, bit by bit.

In memory a `PackedWeight` holds its kept entries in 16 bits whatever its grid is. In a file they are the b-bit codes of
their magnitudes, and a sign each. A sign can be in one of two places, whichever makes the file smaller:

    signs in the codes     ternary states, 1.6 bits per weight, and b + 1 bits per kept entry (the sign is the top bit)
    signs in a plane       a bitmap of positions and one of signs, 2 bits per weight, and b bits per kept entry

The second is smaller when more than two in five entries are kept. Codes lie row by row, the lowest bit first, without
gaps; a row is filled up with zeros to a whole byte.

A kept entry is ± s (a + c), rounded to FP16. That loses so little that c can be read off again: `ValueGrid` sees to
it with its smallest scale and its largest number of bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slablm.packing.planes import pack_bits, unpack_bits


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes row by row, the lowest bit first.

    Args:
        codes: [m, k] uint8, below 2^bits.
        bits: bits of a code, 1 to 8.

    Returns:
        [m, ⌈k · bits / 8⌉] uint8.
    """
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    return pack_bits(((codes[..., None] >> shifts) & 1).bool().flatten(1))


def unpack_codes(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of `pack_codes`.

    Args:
        packed: [m, ⌈k · bits / 8⌉] uint8.
        bits: bits of a code.
        k: codes per row.

    Returns:
        [m, k] uint8.
    """
    shifts = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    single = unpack_bits(packed, k * bits).view(len(packed), k, bits)
    return (single.to(torch.uint8) << shifts).sum(dim=2, dtype=torch.uint8)
