import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.methods.drift import Drift, Squares, mean_drift
from tests import reference


@given(
    st.integers(1, 4),
    st.sampled_from([1, 2, 7, 64, 65, 130]),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_against_the_definition(windows, tokens, hidden, dtype, seed):
    """Also over the edges of the rows that are taken at a time, and where a window has no other tokens."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(windows, tokens, hidden, generator=generator).to(dtype)
    other = (dense + 0.1 * torch.randn(windows, tokens, hidden, generator=generator)).to(dtype)
    found = Drift.of([Squares.of(*pair) for pair in zip(dense, other, strict=True)])
    assert (found.first, found.rest) == pytest.approx(reference.drift(dense, other), rel=1e-12)
    batched = Drift.of([Squares.of(a[None], b[None]) for a, b in zip(dense, other, strict=True)])
    assert batched == found


@given(st.lists(st.tuples(*[st.floats(1e-3, 1e12)] * 4), min_size=1, max_size=9), st.randoms())
def test_the_order_of_windows_changes_no_bit(sums, random):
    windows = [Squares(*numbers) for numbers in sums]
    shuffled = random.sample(windows, len(windows))
    assert Drift.of(shuffled) == Drift.of(windows)


def test_windows_count_by_their_size():
    """One drift over all windows, not a mean of theirs."""
    drift = Drift.of([Squares(1.0, 4.0, 0.0, 96.0), Squares(8.0, 32.0, 1.0, 4.0)])
    assert (drift.first, drift.rest) == (0.5, 0.1)


def test_a_huge_first_token_hides_nothing():
    """99.99 % of the energy is in it, and it hardly changes; all others have changed by half."""
    dense = torch.ones(1, 11, 4)
    dense[:, 0] *= 1000
    other = dense.clone()
    other[:, 1:] *= 1.5
    other[:, 0] *= 1.001
    drift = Drift.of([Squares.of(dense, other)])
    assert drift.first == pytest.approx(0.001, rel=1e-3)
    assert drift.rest == pytest.approx(0.5)
    assert ((other - dense).norm() / dense.norm()).item() < 0.002


def test_float32_would_not_do():
    """A change of one small number among large ones."""
    dense = torch.full((3, 1000), 1e6)
    other = dense.clone()
    other[2, 7] += 1.0
    assert Drift.of([Squares.of(dense, other)]) == Drift(0.0, pytest.approx(1 / (1e6 * 2000**0.5), rel=1e-12))
    dense[:] = 3e30  # its square is no float32
    assert Drift.of([Squares.of(dense, 2 * dense)]).rest == pytest.approx(1)


def test_what_does_not_change_and_what_is_zero():
    states = torch.randn(5, 3)
    assert Drift.of([Squares.of(states, states)]) == Drift(0.0, 0.0)
    assert Drift.of([Squares.of(torch.zeros(5, 3), torch.zeros(5, 3))]) == Drift(0.0, 0.0)


def test_the_mean_is_over_blocks():
    assert mean_drift([Drift(0.0, 0.25), Drift(0.5, 0.75)]) == Drift(0.25, 0.5)
