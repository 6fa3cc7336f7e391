"""The Triton kernels: two loops around one decoder.

A *group* is four consecutive columns of a row, one thread's work at a time: it reads the word that holds the group's
bits, counts the kept columns of the word in front of it, and so knows where the values of the group begin. `_decode`
turns that into the group's four entries of Ŵ,

    s_i q (or the stored value) where kept,      ±Σ_q u_q v_q elsewhere,

in float32. Neighbouring threads take neighbouring groups, so words, values and inputs are read in order, and the values
of a word (14 of 32 at 50 %) lie in one or two cache lines.

- `matvec`: a few tokens. Every thread keeps a sum per row and token; one reduction when the rows are done.
- `unpack`: rows of Ŵ into a buffer, for the vendor's matrix product.

Sizes are in columns or groups; n and the width of `right` are multiples of nothing, or of a word (32 columns).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _popcount(bits):
    """Number of set bits of uint32. LLVM knows the pattern and makes one instruction of it."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return (bits * 0x01010101) >> 24


@triton.jit
def _values(first, kept):
    """The values of the four columns: a column takes the first value that no kept column before it has taken.

    All four are loaded, so the address is computed once, and each kept column shifts the rest by one.
    """
    a0 = tl.load(first).to(tl.float32)
    a1 = tl.load(first + 1).to(tl.float32)
    a2 = tl.load(first + 2).to(tl.float32)
    a3 = tl.load(first + 3).to(tl.float32)
    shift = (kept & 1) != 0
    b0, b1, b2 = tl.where(shift, a1, a0), tl.where(shift, a2, a1), tl.where(shift, a3, a2)
    shift = (kept & 2) != 0
    c0, c1 = tl.where(shift, b1, b0), tl.where(shift, b2, b1)
    return a0, b0, c0, tl.where((kept & 4) != 0, c1, c0)


@triton.jit
def _term(u, across, minus, SIGNS: tl.constexpr):
    """One term ±u v of the background in rows [R] and one column of the groups [G]; bit 0 of `minus` is its sign.

    The sign goes to v, of which both kinds are at hand: one choice and one product per entry.
    """
    v = tl.load(across)[None, :]
    if SIGNS:
        v = tl.where((minus & 1) != 0, -v, v)
    return u[:, None] * v


@triton.jit
def _outer(u, across, minus, SIGNS: tl.constexpr):
    """`_term` for the four columns of the groups: four tensors [R, G]."""
    b0 = _term(u, across, minus, SIGNS)
    b1 = _term(u, across + 1, minus >> 1, SIGNS)
    b2 = _term(u, across + 2, minus >> 2, SIGNS)
    b3 = _term(u, across + 3, minus >> 3, SIGNS)
    return b0, b1, b2, b3


@triton.jit
def _decode(
    values,
    planes,
    offsets,
    left,
    right,
    rows,
    group,
    first_left,
    shrink,
    row_kept,
    words,
    RANK: tl.constexpr,
    SIGNS: tl.constexpr,
):
    """Entries of Ŵ / s in rows [R] and groups [G]: four tensors [R, G] float32, one per column of the group.

    `planes` is read as one number per word, positions below signs. `first_left` [R] is u_1 / s, loaded once by the
    caller. Groups behind the last word repeat it: there is no mask in the loop, the caller has to drop them.
    """
    word = tl.minimum(group // 8, words - 1)
    at = rows[:, None] * words + word[None, :]
    shift = (group % 8 * 4).to(tl.uint32)[None, :]
    state = tl.load(planes + at)
    bits = state.to(tl.uint32)
    offset = tl.load(offsets + at).to(tl.uint16, bitcast=True).to(tl.uint32)
    offset += _popcount(bits & ((tl.full(shift.shape, 1, tl.uint32) << shift) - 1))
    kept = bits >> shift
    minus = kept
    if SIGNS:
        minus = (state >> 32).to(tl.uint32) >> shift
    across = right + word * 32 + group % 8 * 4
    v0, v1, v2, v3 = _values(values + rows.to(tl.int64)[:, None] * row_kept + offset, kept)

    # The first term is no sum with zero: the compiler would have to keep that addition.
    b0 = tl.zeros(kept.shape, tl.float32)
    b1, b2, b3 = b0, b0, b0
    if RANK > 0:
        b0, b1, b2, b3 = _outer(first_left, across, minus, SIGNS)
    for q in tl.static_range(1, RANK):
        u = tl.load(left + rows * RANK + q) * shrink
        c0, c1, c2, c3 = _outer(u, across + q * words * 32, minus, SIGNS)
        b0, b1, b2, b3 = b0 + c0, b1 + c1, b2 + c2, b3 + c3
    w0 = tl.where((kept & 1) != 0, v0, b0)
    w1 = tl.where((kept & 2) != 0, v1, b1)
    w2 = tl.where((kept & 4) != 0, v2, b2)
    w3 = tl.where((kept & 8) != 0, v3, b3)
    return w0, w1, w2, w3


@triton.jit
def _scale_and_left(scales, left, rows, RANK: tl.constexpr, SCALED: tl.constexpr):
    """s, 1 / s and u_1 / s of the rows, each [R]; s is 1 for values that are not quantized."""
    scale = tl.full(rows.shape, 1.0, tl.float32)
    if SCALED:
        scale = tl.load(scales + rows)
    shrink = 1.0 / scale
    u = shrink
    if RANK > 0:
        u = tl.load(left + rows * RANK) * shrink
    return scale, shrink, u


@triton.jit
def _product(inputs, column, n, weight, token, tokens):
    """Inputs of one column times entries [R, G]: [T, R, G] float32."""
    mask = (token < tokens)[:, None] & (column < n)[None, :]
    x = tl.load(inputs + token[:, None] * n + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return x[:, None, :] * weight[None, :, :]


@triton.jit
def matvec(
    inputs,
    outputs,
    values,
    scales,
    planes,
    offsets,
    left,
    right,
    tokens,
    m,
    n,
    row_kept,
    words,
    RANK: tl.constexpr,
    SIGNS: tl.constexpr,
    SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Outputs [t, m] = inputs [t, n] Ŵᵀ for t ≤ TOKENS; a program does ROWS rows, GROUPS groups at a time."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(rows, m - 1)
    token = tl.arange(0, TOKENS)
    scale, shrink, u = _scale_and_left(scales, left, inside, RANK, SCALED)
    sums = tl.zeros([TOKENS, ROWS, GROUPS], tl.float32)
    for start in range(0, words * 8, GROUPS):
        group = start + tl.arange(0, GROUPS)
        w0, w1, w2, w3 = _decode(
            values,
            planes,
            offsets,
            left,
            right,
            inside,
            group,
            u,
            shrink,
            row_kept,
            words,
            RANK,
            SIGNS,
        )
        sums += _product(inputs, group * 4, n, w0, token, tokens)
        sums += _product(inputs, group * 4 + 1, n, w1, token, tokens)
        sums += _product(inputs, group * 4 + 2, n, w2, token, tokens)
        sums += _product(inputs, group * 4 + 3, n, w3, token, tokens)
    result = tl.sum(sums, axis=2) * scale[None, :]
    tl.store(outputs + token[:, None] * m + rows[None, :], result, mask=(token < tokens)[:, None] & (rows < m)[None, :])


@triton.jit
def _tile(w0, w1, w2, w3, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Four tensors [R, G], one per column of the groups, side by side in column order: [R, 4 G]."""
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, COLUMNS])


@triton.jit
def unpack(
    outputs,
    values,
    scales,
    planes,
    offsets,
    left,
    right,
    begin,
    end,
    n,
    row_kept,
    words,
    RANK: tl.constexpr,
    SIGNS: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Rows begin … end of Ŵ into outputs [end − begin, n], rounded to its type."""
    rows = begin + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(rows, end - 1)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    scale, shrink, u = _scale_and_left(scales, left, inside, RANK, SCALED)
    w0, w1, w2, w3 = _decode(
        values, planes, offsets, left, right, inside, group, u, shrink, row_kept, words, RANK, SIGNS
    )
    weight = _tile(w0, w1, w2, w3, ROWS, 4 * GROUPS) * scale[:, None]
    column = tl.program_id(1) * 4 * GROUPS + tl.arange(0, 4 * GROUPS)
    at = (rows - begin).to(tl.int64)[:, None] * n + column[None, :]
    tl.store(outputs + at, weight, mask=(rows < end)[:, None] & (column < n)[None, :])
