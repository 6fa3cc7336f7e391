from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.calibration.pairwise import LEAVES, PairwiseSum, leaf_of, most_sums, share
from slablm.system.distributed import World

TERMS = 1000 * torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(0))


def add_up(leaves):
    tree = PairwiseSum()
    for leaf in leaves:
        tree.add((0, leaf), TERMS[leaf].clone())
    return tree


@given(st.sets(st.integers(0, 39), min_size=1), st.lists(st.integers(0, 40), max_size=5), st.randoms())
def test_no_division_among_ranks_changes_a_bit(leaves, cuts, random):
    """Each rank has a run of leaves, some of which no layer has seen, and hands on what it could add up."""
    wanted = add_up(sorted(leaves)).total()
    torch.testing.assert_close(wanted.double(), TERMS[sorted(leaves)].double().sum(dim=0), rtol=1e-5, atol=1e-3)
    bounds = [0, *sorted(cuts), 40]
    nodes = []
    for start, stop in pairwise(bounds):
        nodes += add_up([leaf for leaf in sorted(leaves) if start <= leaf < stop]).nodes.items()
    random.shuffle(nodes)
    together = PairwiseSum()
    for node, value in nodes:
        together.add(node, value)
    assert torch.equal(together.total(), wanted)


def test_one_after_the_other_would_depend_on_the_division():
    """Else the test above could not fail."""
    in_order = torch.stack(list(TERMS)).cumsum(dim=0)[-1]
    halves = TERMS[:20].cumsum(dim=0)[-1] + TERMS[20:].cumsum(dim=0)[-1]
    assert not torch.equal(in_order, halves)


@given(st.sets(st.integers(0, 39)))
def test_the_number_of_sums_at_a_time(leaves):
    tree, most = PairwiseSum(), 0
    for leaf in sorted(leaves):
        most = max(most, len(tree.nodes) + 1)  # the one that is being formed
        tree.add((0, leaf), TERMS[leaf].clone())
    assert most_sums(sorted(leaves)) == (most, len(tree.nodes))


@given(st.integers(0, 300), st.integers(1, LEAVES))
def test_ranks_have_whole_leaves_which_differ_by_one_window_at_most(windows, size):
    leaves = [leaf_of(window, windows) for window in range(windows)]
    assert sorted(set(leaves)) == list(range(min(windows, LEAVES)))
    assert leaves == sorted(leaves)
    sizes = [leaves.count(leaf) for leaf in set(leaves)]
    assert not sizes or max(sizes) - min(sizes) <= 1
    shares = [share(World(rank, size), windows) for rank in range(size)]
    assert [window for mine in shares for window in mine] == list(range(windows))
    owners = [{leaves[window] for window in mine} for mine in shares]
    assert sum(map(len, owners)) == len(set(leaves))
    assert windows < size or all(owners)


def test_nothing_has_no_sum():
    assert PairwiseSum().total() is None
