"""Where blocks come from, and where they go.

The loop over the blocks (`slablm.compression.blocks`) asks a store for one block at a time and hands it back finished.
The plain store here leaves the model in memory; `slablm.compression.streaming` has one that reads each block from files
and drops it again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from slablm.calibration.activations import Activations
from slablm.checkpoint.layer_report import LayerReport
from slablm.methods.drift import Drift
from slablm.packing import Packed


@dataclass
class FinishedBlock:
    """What remains of one block's target layers.

    Attributes:
        packed: packed weights by full name; empty with a method that has no packed form.
        reports: one per layer.
        drift: behind the block; None if there was no text to measure it on.
    """

    packed: dict[str, Packed] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    drift: Drift | None = None


class BlockStore:
    """Where blocks come from and where they go. This one: the model is in memory, and so it stays.

    Attributes:
        drift: behind every block that is finished; empty if there was no text to measure it on.
    """

    done = 0  # blocks that an earlier run has finished

    def __init__(self) -> None:
        self.drift: list[Drift] = []

    def activations(self, count: int) -> Activations:
        """An empty buffer for the hidden states of `count` windows."""
        return Activations(count)

    def outside(self) -> AbstractContextManager[None]:
        """Within it, what the decoder has outside its blocks is there to be run."""
        return nullcontext()

    def load(self, index: int) -> None:
        """Make dense block `index` ready to be run; blocks loaded before need not be kept."""

    def finished(self, index: int) -> FinishedBlock:
        """Block `index` as an earlier run has left it; only for the first `done` blocks."""
        raise NotImplementedError

    def finish(self, index: int, block: FinishedBlock) -> None:
        """Take over block `index`; its target layers are `SlabLinear` by now."""
        if block.drift is not None:
            self.drift.append(block.drift)
