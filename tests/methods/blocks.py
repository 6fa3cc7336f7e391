"""A block of columns to be settled, and what must hold of any answer."""

import torch
from hypothesis import strategies as st


def random_block(b, m, levels, groups, *, apart, seed=0):
    """Arguments of `nearest_columns`. `apart`: errors are to other values than the current ones, as in a descent.

    The alphabet is as stored, FP16: its values are exact in float32.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    current = normal(b, m)
    current[normal(b, m) > 2] = 0
    before = normal(b, m) if apart else None
    scales = (normal(groups, m).abs() / 2).half().float()
    scales[normal(groups, m) > 2] = 0
    values = normal(levels).abs().add(0.1).sort().values.half().float()
    left, right = (normal(size).abs().half().float() for size in (m, b))
    of_group = torch.randint(groups, (b,), generator=generator)
    # Below the diagonal there may be anything.
    return current, before, normal(b, b) / (2 * b**0.5), 0.5 + normal(b).abs(), left, right, scales, of_group, values


# b and m: one, more than a piece of the CUDA text, no multiple of it.
blocks = st.builds(
    random_block,
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 15),
    st.integers(1, 4),
    apart=st.booleans(),
    seed=st.integers(0, 1000),
)


def check_settled(arguments, columns, errors):
    """Every entry is the nearest value to what the errors that were found to its left have made of it.

    So it does not matter that where two values are all but equally near, rounding may choose, and all that follows
    differ.
    """
    current, before, coefficients, divisors, left, right, scales, groups, levels = (
        part if part is None or part.dtype == torch.int64 else part.double().cpu() for part in arguments
    )
    columns, errors = columns.double().cpu(), errors.double().cpu()
    target = current - coefficients.triu(1).T @ errors
    found = torch.stack([left * right[:, None], *(scales[groups.cpu()] * level for level in levels)])
    distances = (found - target.abs()).abs()
    assert (found == columns.abs()).any(dim=0).all()
    assert ((columns.abs() - target.abs()).abs() <= distances.amin(dim=0) + 1e-5).all()
    assert ((columns.signbit() == target.signbit()) | (target.abs() < 1e-5)).all()
    base = target if before is None else before
    torch.testing.assert_close(errors, (base - columns) / divisors[:, None], rtol=1e-5, atol=1e-5)
