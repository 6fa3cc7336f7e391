"""Sums whose last bit does not depend on who adds what.

Addition of floats is commutative, not associative: windows that several ranks add up first on their own, and then among
each other, give another Σ XᵀX than one process that adds them one after the other. So the terms are the leaves of a
binary tree, and whoever holds two siblings adds them to their parent:

    level 2        0
    level 1    0       1            node p of level l is the sum of leaves p 2ˡ … (p + 1) 2ˡ − 1
    level 0  0   1   2   3

Which sums are formed then depends on the leaves alone, not on their division or order. The price is memory: in the
middle of a run there are as many sums as the binary number of finished leaves has ones. (The error grows with the
logarithm of the number of terms only: pairwise summation.)
"""

from __future__ import annotations

from torch import Tensor


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


def most_sums(terms: int) -> int:
    """The largest number of sums that are there at a time while `terms` terms come in their order.

    The term that is just being formed is counted: n terms before it leave as many sums as n has ones in binary.
    """
    return max((number.bit_count() + 1 for number in range(terms)), default=0)
