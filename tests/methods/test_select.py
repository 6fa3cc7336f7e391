import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.config import Pattern
from slablm.methods.select import group_mask, top_k_mask
from tests import reference


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 1000), st.booleans(), st.data())
def test_top_k_equals_a_stable_sort(m, n, seed, many_ties, data):
    scores = torch.rand(m, n, generator=torch.Generator().manual_seed(seed))
    if many_ties:
        scores = (scores * 3).floor()
    k = data.draw(st.integers(1, n))
    assert torch.equal(top_k_mask(scores, k), reference.top_k(scores, k))


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
