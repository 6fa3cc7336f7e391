"""XᵀX of bfloat16 inputs: float64 up to the rounding of sums, the same bits for any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from slablm.runtime.kernels import gram, gram_kernel, native
from slablm.runtime.kernels.backends import Backend

HAS_KERNEL = gram_kernel(torch.ones(1, 1, dtype=torch.bfloat16)) is not None
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="no kernel for it on this CPU")


def random_rows(tokens, n, seed=0):
    """Numbers of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, n, generator=generator) * torch.randn(n, generator=generator).exp()
    return rows.bfloat16()


def summed(rows, before=None):
    n = rows.shape[1]
    gram = torch.zeros(n, n) if before is None else before.clone()
    gram_kernel(rows)(gram, rows)
    return gram


def assert_equals_the_exact_sums(gram, rows, before=0.0):
    """On and above the diagonal, up to a small part of the sum of sizes."""
    exact = rows.double()
    allowed = 4e-6 * (exact.abs().T @ exact.abs() + before)
    assert not ((gram - (exact.T @ exact + before)).abs() > allowed).triu().any()


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 70), st.integers(1, 230), st.integers(0, 1000))
def test_it_is_the_sum_of_products(tokens, n, seed):
    rows = random_rows(tokens, n, seed)
    assert_equals_the_exact_sums(summed(rows), rows)


@needs_kernel
@pytest.mark.parametrize("tokens", [1, 2, 511, 513, 2047, 2048, 2049, 4099])
def test_many_tokens_are_taken_in_turns(tokens):
    rows = random_rows(tokens, 250)
    assert_equals_the_exact_sums(summed(rows), rows)


@needs_kernel
@pytest.mark.parametrize("n", [1, 7, 8, 9, 47, 48, 49, 191, 192, 193, 385])
def test_it_is_added_to_what_is_there_and_nothing_else_is_written(n):
    rows = random_rows(30, n)
    room = torch.full((n + 2, n), 3.0)
    gram_kernel(rows)(room[1:-1], rows)
    assert_equals_the_exact_sums(room[1:-1], rows, before=3.0)
    assert (room[[0, -1]] == 3).all()


@needs_kernel
@pytest.mark.parametrize(("tokens", "n"), [(600, 1000), (2100, 300), (3, 50)])
def test_threads_change_nothing(tokens, n, monkeypatch):
    rows = random_rows(tokens, n)
    found = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(summed(rows, torch.ones(n, n)))
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_kernel
def test_integers_are_summed_exactly():
    """Each number at its place, and twice where it is above and below the diagonal of a block of 48 columns."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-9, 10, (301, 150), generator=generator).bfloat16()
    exact = rows.float().T @ rows.float()
    gram = summed(rows)
    assert torch.equal(gram.triu(), exact.triu())
    for start in range(0, 150, 48):
        block = slice(start, start + 48)
        assert torch.equal(gram[block, block], exact[block, block])


@needs_kernel
def test_rows_may_be_a_view():
    rows = random_rows(40, 60)
    for view in (rows.mT.contiguous().mT, torch.stack([rows, rows], dim=2)[..., 0], torch.cat([rows, rows], 1)[:, :60]):
        assert not view.is_contiguous()
        assert torch.equal(summed(view), summed(rows))


@needs_kernel
@pytest.mark.parametrize("tokens", [3, 4])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("column", [0, 50, 99])
def test_what_is_not_finite_stays_so_and_stays_in_its_column(tokens, value, column):
    rows = random_rows(tokens, 100)
    rows[:, 10] = 0
    rows[tokens - 1, column] = value
    wide = rows.float()
    expected = wide.T @ wide
    found = summed(rows).triu()
    torch.testing.assert_close(found, expected.triu(), rtol=1e-5, atol=1e-5, equal_nan=True)


@needs_kernel
def test_numbers_that_float32_cannot_multiply_are_0():
    rows = torch.tensor([[1e-39, 1.0, 1e-30]], dtype=torch.bfloat16)
    found = summed(rows)
    assert torch.equal(found[0], torch.zeros(3))
    assert found[2, 2] == 0
    assert found[1, 2] == rows[0, 2].float()


@needs_kernel
@pytest.mark.parametrize(
    ("before", "rows"),
    [
        (torch.zeros(8, 8), torch.zeros(3, 8)),
        (torch.zeros(8, 8, dtype=torch.float64), torch.zeros(3, 8, dtype=torch.bfloat16)),
        (torch.zeros(8, 9), torch.zeros(3, 8, dtype=torch.bfloat16)),
        (torch.zeros(8, 16)[:, ::2], torch.zeros(3, 8, dtype=torch.bfloat16)),
    ],
)
def test_what_c_would_misread_is_refused(before, rows):
    with pytest.raises(RuntimeError, match="a kernel needs bfloat16 inputs"):
        gram.add_gram(native.load(), "avx512", before, rows)


def test_other_numbers_and_tensors_without_any_have_no_kernel():
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert gram_kernel(torch.ones(2, 3, dtype=dtype)) is None
    assert gram_kernel(torch.ones(2, 3, dtype=torch.bfloat16, device="meta")) is None
    with FakeTensorMode():
        assert gram_kernel(torch.ones(2, 3, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("name", ["portable", "reference"])
def test_the_environment_can_turn_it_off(name, monkeypatch):
    if name != "reference" and isinstance(native.load(), str):
        pytest.skip("no compiled kernels")
    monkeypatch.setenv("SLABLM_KERNEL", name)
    assert gram_kernel(torch.ones(2, 3, dtype=torch.bfloat16)) is None


def test_without_a_library_there_is_none(monkeypatch):
    monkeypatch.setattr(gram, "backend", lambda: Backend("reference", "not here"))
    assert gram_kernel(torch.ones(2, 3, dtype=torch.bfloat16)) is None
