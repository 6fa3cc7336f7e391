"""Sums whose last bit does not depend on who adds what.

Addition of floats is commutative, not associative: windows that several ranks add up first on their own, and then among
each other, give another Σ XᵀX than one process that adds them one after the other. So the terms are the leaves of a
binary tree, and whoever holds two siblings adds them to their parent:

    level 2        0
    level 1    0       1            node p of level l is the sum of leaves p 2ˡ … (p + 1) 2ˡ − 1
    level 0  0   1   2   3

Which sums are formed then depends on the leaves alone, not on their division or order. The price is memory: in the
middle of a run there are as many sums as the binary number of finished leaves has ones. So there are 16 leaves at most,
each of them a run of windows that one rank adds up one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from slablm.system.distributed import World

LEAVES = 16
# Where a sum is that is closed: above all others.
_CLOSED = (LEAVES, 0)


def leaf_of(window: int, windows: int) -> int:
    """The leaf that a window belongs to.

    Args:
        window: its number.
        windows: how many there are; they are divided evenly.
    """
    return ((window + 1) * min(windows, LEAVES) - 1) // windows


def share(world: World, windows: int) -> range:
    """A rank's part of some windows in a row: whole leaves; the last ranks have one more if they do not divide evenly.

    Args:
        world: the rank.
        windows: how many there are.
    """
    leaves = min(windows, LEAVES)
    mine = world.share(leaves)
    return range(mine.start * windows // leaves, mine.stop * windows // leaves) if leaves else range(0)


class PairwiseSum:
    """Σ of tensors of one shape, which are given away to it.

    Attributes:
        nodes: sums that have no sibling so far, by (level, place).
    """

    def __init__(self) -> None:
        self.nodes: dict[tuple[int, int], Tensor] = {}

    def add(self, node: tuple[int, int], value: Tensor) -> None:
        """Put a sum into the tree.

        Args:
            node: its (level, place); a term is (0, its number).
            value: the sum; may be changed.
        """
        level, place = node
        while (sibling := self.nodes.pop((level, place ^ 1), None)) is not None:
            value = sibling.add_(value)
            level, place = level + 1, place >> 1
        self.nodes[level, place] = value

    def total(self) -> Tensor | None:
        """The sum of all that is in the tree, which ends it; None if there is nothing."""
        rest = [self.nodes[node] for node in sorted(self.nodes)]
        self.nodes.clear()
        if not rest:
            return None
        total = rest[0]
        for value in rest[1:]:
            total.add_(value)
        return total

    def close(self) -> None:
        """Keep the sum of all alone: nobody will add anything."""
        total = self.total()
        if total is not None:
            self.nodes[_CLOSED] = total


def most_sums(leaves: Iterable[int]) -> tuple[int, int]:
    """How many sums there are while leaves come in their order.

    Args:
        leaves: their numbers.

    Returns:
        The most at a time, the one included that is just being formed; and those that are left in the end.
    """
    nodes: set[tuple[int, int]] = set()
    most = 0
    for place in leaves:
        most = max(most, len(nodes) + 1)
        node = (0, place)
        while (sibling := (node[0], node[1] ^ 1)) in nodes:
            nodes.remove(sibling)
            node = (node[0] + 1, node[1] >> 1)
        nodes.add(node)
    return most, len(nodes)
