"""A block of columns to be settled, and what must hold of any answer."""

import itertools

import torch
from hypothesis import strategies as st
from torch.nn import functional

from slablm.methods.symbols import TILE_ROWS, level_values, signs


def random_block(b, m, bits, *, apart, seed=0):
    """Arguments of `trellis_columns`. `apart`: errors are to other values than the current ones, as in a descent.

    Scales and levels are as stored: their products are exact in float32.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    current = normal(b, m)
    current[normal(b, m) > 2] = 0
    before = normal(b, m) if apart else None
    scales = (2 * normal(m).abs()).half().float()
    scales[normal(m) > 2] = 0
    # Those of either parity ascending; some may be the same.
    levels = torch.randint(-128, 128, (2 ** (bits - 1), 2), generator=generator).sort(dim=0).values.flatten()
    # Below the diagonal there may be anything.
    coefficients, divisors = normal(b, b) / (2 * b**0.5), 0.5 + normal(b).abs()
    return current, before, coefficients, divisors, scales, level_values(levels)


# b and m: one, a tile that lacks rows, more than the tiles that are settled together.
blocks = st.builds(
    random_block,
    st.integers(1, 40),
    st.integers(1, 150),
    st.integers(2, 5),
    apart=st.booleans(),
    seed=st.integers(0, 1000),
)


def check_settled(arguments, codes, columns, errors):
    """Every tile has the nearest values to what the errors that were found to its left have made of it.

    So it does not matter that where two ways are all but equally near, rounding may choose, and what follows differs.
    """
    current, before, coefficients, divisors, scales, levels = (
        part if part is None else part.double().cpu() for part in arguments
    )
    codes, columns, errors = codes.cpu(), columns.double().cpu(), errors.double().cpu()
    assert codes.dtype == torch.uint8
    assert torch.equal(columns, signs(codes.T).T * levels[codes.long()] * scales)
    target = current - coefficients.triu(1).T @ errors
    found, size = (_by_tile(part.square()).sum(dim=2) for part in (columns - target, target))
    assert (found <= smallest_distances(target, scales, levels) + 1e-5 * (1 + size)).all()
    base = target if before is None else before
    torch.testing.assert_close(errors, (base - columns) / divisors[:, None], rtol=1e-5, atol=1e-5)


def smallest_distances(targets, scales, levels):
    """The squared distance of every tile's best symbols, [b, tiles]; of [b, m] targets."""
    values = scales[:, None] * levels
    missing = -targets.shape[1] % TILE_ROWS
    rows = {}
    for above, parity in itertools.product((0, 1), repeat=2):
        own = (targets[..., None] - (1 - 2 * above) * values[:, parity::2]).square().amin(dim=2)
        # Rows that are not there have symbols 0.
        rows[above, parity] = functional.pad(own, (0, missing), value=torch.inf if parity else 0.0)
    ways = itertools.product((0, 1), repeat=TILE_ROWS)
    sums = [sum(_by_tile(rows[way[i - 1], way[i]])[..., i] for i in range(TILE_ROWS)) for way in ways]
    return torch.stack(sums).amin(dim=0)


def _by_tile(rows):
    return functional.pad(rows, (0, -rows.shape[1] % TILE_ROWS)).unflatten(1, (-1, TILE_ROWS))
