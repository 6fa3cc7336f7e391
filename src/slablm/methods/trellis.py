"""The symbols that bring a column next to given numbers: a search in a small trellis.

In the four rows of a tile (`symbols`) an entry's values are ±s_i a_c, with the sign that the parity of the symbol above
gives. Of the symbols with one parity, which leave the entry below with the same sign, the one whose value is nearest is
always the best. So of every row four distances count: for each parity above and each of its own. The four rows are a
cycle with two states, and the best of its 2⁴ ways

    min over parities π₀ … π₃ of  d₀(π₃, π₀) + d₁(π₀, π₁) + d₂(π₁, π₂) + d₃(π₂, π₃)

is found by trying them all. This is trellis-coded quantization (Marcellin and Fischer 1990) with Ungerboeck's
partition of an alphabet into alternate levels, on a cycle: for normally distributed numbers and 4 bits its squared
error is a fifth below that of the best 16 levels, and a tile can be read without any other.

The column may be one in a sweep (`sweep`, `descent`): an error in any row of a column counts alike, so there, too,
the nearest symbols are the best. One column comes after the other, with many small steps of arithmetic each, most of
whose time goes into starting them. So a block of columns is one operator. What is here is plain torch, and says what
the result is; a device may have another implementation registered, which may choose otherwise where two ways are all
but equally near.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from slablm.methods.sweep import fed_forward
from slablm.methods.symbols import TILE_ROWS

# Parities of the four rows.
_WAYS = tuple(itertools.product((0, 1), repeat=TILE_ROWS))


def nearest_codes(targets: Tensor, scales: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The symbols whose values have the smallest squared distance.

    Args:
        targets: columns, each by itself, [..., m] float32.
        scales: s, [m] float32.
        levels: a, [2^p] float32, those of either parity ascending.

    Returns:
        c, [..., m] uint8, and their values τ s a, [..., m] float32.
    """
    m = targets.shape[-1]
    tiled, own_scales = (_in_tiles(part) for part in (targets, scales))
    codes, values = _nearest_of_each(tiled, own_scales, levels)
    distances = (values - tiled).square()
    if m % TILE_ROWS:
        # Rows that are not there have symbols 0.
        distances[:, 1, ..., -1, m % TILE_ROWS :] = torch.inf
        codes[:, 0, ..., -1, m % TILE_ROWS :] = 0
    row = distances.unbind(dim=-1)
    # A sum over two rows each, so that an infinity in one way is one in no other.
    ways = torch.stack([(row[0][d, a] + row[1][a, b]) + (row[2][b, c] + row[3][c, d]) for a, b, c, d in _WAYS])
    parities = torch.tensor(_WAYS, device=targets.device)[ways.argmin(dim=0)]
    chosen = (2 * parities.roll(1, dims=-1) + parities)[None]
    best = (part.flatten(0, 1).gather(0, chosen)[0].flatten(-2)[..., :m] for part in (codes, values))
    return next(best), next(best)


def _in_tiles(rows: Tensor) -> Tensor:
    """[..., m] → [..., ⌈m / 4⌉, 4], filled up with 0."""
    padded = functional.pad(rows, (0, -rows.shape[-1] % TILE_ROWS))
    return padded.view(*rows.shape[:-1], -1, TILE_ROWS)


def _nearest_of_each(targets: Tensor, scales: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest symbol of each parity under each, and its value, [above, own, ..., tiles, 4] uint8 and float32."""
    relative = targets / scales.clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.empty(2, 2, *targets.shape, dtype=torch.uint8, device=targets.device)
    values = targets.new_empty(codes.shape)
    for above, parity in itertools.product((0, 1), repeat=2):
        sign, own = 1 - 2 * above, levels[parity::2].contiguous()
        index = torch.bucketize(sign * relative, (own[1:] + own[:-1]) / 2)
        codes[above, parity] = 2 * index + parity
        values[above, parity] = sign * own[index] * scales
    return codes, values


def plain_trellis_columns(
    current: Tensor,
    before: Tensor | None,
    coefficients: Tensor,
    divisors: Tensor,
    scales: Tensor,
    levels: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace the columns of a block one after the other; all float32.

    Args:
        current: `weight` of the `Block`, transposed, [b, m].
        before: of the `Block`, [b, m] or None.
        coefficients: of the `Block`, [b, b], of which only what is above the diagonal counts.
        divisors: of the `Block`, [b].
        scales: s, [m].
        levels: a, [2^p], those of either parity ascending.

    Returns:
        The symbols, [b, m] uint8; the new columns and their errors, both [b, m].
    """
    current, codes = current.clone(), torch.empty_like(current, dtype=torch.uint8)

    def replace(j: int) -> Tensor:
        codes[j], values = nearest_codes(current[j], scales, levels)
        return values

    columns, errors = fed_forward(current, before, coefficients, divisors, replace)
    return codes, columns, errors


trellis_columns = torch.library.custom_op("slablm::trellis_columns", plain_trellis_columns, mutates_args=())
