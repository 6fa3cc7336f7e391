"""Grids and their clips against the search written out, entry by entry in Python's own numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slablm.config import CompressionConfig
from slablm.methods import LayerStats
from slablm.methods.quantizers import rtn, rtn_plain, weighted_grids
from slablm.methods.uniform import CLIPS, clipped_grids, in_groups, spanning_grids


def half(number):
    return torch.tensor(number, dtype=torch.float64).half().item()


def rounded(row, clip, bits):
    """A group of one row on the grid of one clip: (values, scale, zero)."""
    top, low, high = 2**bits - 1, clip * min([0.0, *row]), clip * max([0.0, *row])
    scale = half(max((high - low) / top, 2.0**-24))
    zero = min(max(round(-low / scale), 0), top)
    return [scale * (min(max(round(w / scale) + zero, 0), top) - zero) for w in row], scale, zero


def lost(row, values, importance):
    return sum(d2 * (v - w) ** 2 for w, v, d2 in zip(row, values, importance, strict=True))


def check(weight, grids, importance, bits, group_size):
    """The error of the grid that was found is the smallest of all clips'."""
    scales, zeros = grids
    for i, row in enumerate(weight.tolist()):
        for g, start in enumerate(range(0, len(row), group_size)):
            group, d2 = row[start : start + group_size], importance[start : start + group_size]
            tried = [lost(group, rounded(group, clip, bits)[0], d2) for clip in CLIPS]
            scale, zero, top = scales[i, g].item(), zeros[i, g].item(), 2**bits - 1
            found = [scale * (min(max(round(w / scale) + zero, 0), top) - zero) for w in group]
            assert lost(group, found, d2) == pytest.approx(min(tried), rel=1e-3, abs=1e-10)
            candidates = [rounded(group, clip, bits)[1] for clip in CLIPS]
            assert min(abs(scale - candidate) for candidate in candidates) <= 2e-3 * scale


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 40), st.integers(2, 8), st.integers(0, 999))
def test_no_clip_is_better_than_the_one_found(m, n, group_size, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, importance = torch.randn(m, n, generator=generator) ** 3, torch.rand(n, generator=generator) ** 4
    config = CompressionConfig(value_bits=bits, group_size=group_size)
    stats = LayerStats(torch.ones(n), 1, torch.empty(0, n))
    check(weight, weighted_grids(weight, importance, config), importance.tolist(), bits, group_size)
    result = rtn(weight, stats, config)
    check(weight, (result.scales, result.zeros), [1.0] * n, bits, group_size)


def test_clipping_helps_where_few_weights_are_large():
    """At 3 bits and groups of 128 of a normal distribution."""
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(0))
    stats = LayerStats(torch.ones(512), 1, torch.empty(0, 512))
    config = CompressionConfig(value_bits=3)
    plain, clipped = ((method(weight, stats, config).dense() - weight).square().sum() for method in (rtn_plain, rtn))
    assert clipped < 0.8 * plain  # measured: 0.74


def test_of_equal_clips_the_widest_is_taken():
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    found = clipped_grids(weight, 4, 8, lambda lost: torch.zeros(lost.shape[:2]))
    for ours, plain in zip(found, spanning_grids(weight, 4, 8), strict=True):
        assert torch.equal(ours, plain)


def test_the_last_group_is_filled_up_with_zeros():
    assert in_groups(torch.ones(1, 5), 3).tolist() == [[[1, 1, 1], [1, 1, 0]]]


def test_inputs_that_are_never_there_decide_nothing():
    weight = torch.tensor([[1.0, 0.9, 0.1, 0.2, 8.0]])
    scales, _ = weighted_grids(weight, torch.zeros(5), CompressionConfig(value_bits=4, group_size=5))
    assert scales.item() == pytest.approx(8 / 15, rel=1e-3)
