import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.config import Pattern
from slablm.methods.select import _gather_entries, _resolve_ties, group_mask, kept_entries, top_k_mask
from tests import reference


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 1000), st.booleans(), st.data())
def test_top_k_equals_a_stable_sort(m, n, seed, many_ties, data):
    scores = torch.rand(m, n, generator=torch.Generator().manual_seed(seed))
    if many_ties:
        scores = (scores * 3).floor()
    k = data.draw(st.integers(1, n))
    expected = reference.top_k(scores, k)
    assert torch.equal(top_k_mask(scores, k), expected)
    # What runs on a GPU.
    threshold = torch.kthvalue(scores, n - k + 1, dim=1, keepdim=True).values
    assert torch.equal(_resolve_ties(scores, threshold, k), expected)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 1000), st.data())
def test_kept_entries_are_in_column_order(m, n, seed, data):
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    k = data.draw(st.integers(1, n))
    mask = reference.top_k(matrix, k)
    expected = torch.stack([row[kept] for row, kept in zip(matrix, mask, strict=True)])
    assert torch.equal(kept_entries(matrix, mask, k), expected)
    assert torch.equal(_gather_entries(matrix, mask, k), expected)  # what runs on a GPU


@given(st.sampled_from([(2, 4), (4, 8), (1, 4), (3, 5)]), st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_patterns_equal_the_reference(pattern, groups, seed, many_ties):
    survivors, group = pattern
    scores = torch.rand(5, groups * group, generator=torch.Generator().manual_seed(seed))
    if many_ties:
        scores = (scores * 3).floor()
    full = groups * survivors
    for k in {1, (full + 1) // 2, full}:
        mask = top_k_mask(scores, k, Pattern(survivors, group))
        assert torch.equal(mask, reference.top_k(scores, k, pattern))
    assert torch.equal(group_mask(scores, Pattern(survivors, group)), reference.top_k(scores, full, pattern))
