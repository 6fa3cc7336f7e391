"""The calibration windows on their way through the blocks.

Up to two streams of hidden states walk side by side, and every block is run on both:

    windows   all tokens; from them come the statistics of every layer, and with the last ones errors are measured
    probes    with a budget in true bits: the first tokens of the first windows, to see how sensitive a block is to
              each of its layers (`slablm.calibration.sensitivity`)

Each has calls of its own, as masks and positions are as long as what is run.

Among the windows are the unseen ones a second time. Everything else goes through compressed blocks; these copies go
through the dense ones, each block being run on them before its layers are replaced. How far the two have come apart
behind a block is its drift (`slablm.methods.drift`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from slablm.calibration.activations import Activations
from slablm.calibration.capture import capture_block_calls, collect_stats, in_float32
from slablm.calibration.pairwise import share
from slablm.calibration.sensitivity import sensitivities
from slablm.calibration.statistics import Use
from slablm.config import CompressionConfig
from slablm.methods import LayerStats, get_method
from slablm.methods.drift import Drift, Squares
from slablm.system.distributed import World
from slablm.system.finite import check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# One window in so many is kept back for the methods that need it.
HELD_OUT_SHARE = 8
PROBES, PROBE_TOKENS = 2, 512


class BlockSource(Protocol):
    """What calibration asks of whoever holds the model."""

    def activations(self, count: int) -> Activations:
        """An empty buffer for the hidden states of `count` windows."""

    def outside(self) -> AbstractContextManager[None]:
        """Within it, what the decoder has outside its blocks is there to be run."""

    def load(self, index: int) -> None:
        """Make dense block `index` ready to be run."""


class Stream:
    """Hidden states of some windows, and how each block is called on them.

    Args:
        model: the model.
        blocks: its decoder blocks.
        windows: token ids, [windows, tokens]; none for a stream that is not needed.
        source: gives the first blocks.
        hidden: the buffer; by default all in RAM.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        windows: Tensor,
        source: BlockSource,
        hidden: Activations | None = None,
    ) -> None:
        self._blocks = blocks
        self.hidden, self.calls = (
            capture_block_calls(model, blocks, windows, model.device, load=source.load, hidden=hidden)
            if len(windows)
            else (Activations(0), [])
        )

    def run(self, index: int, states: Tensor) -> Tensor:
        """Block `index` on hidden states in front of it, [1, tokens, hidden_size]."""
        return self.calls[index](self._blocks[index], states)

    def propagate(self, index: int, windows: range | None = None) -> None:
        """Go past a block as it is now, with all windows or some."""
        for i in range(len(self.hidden)) if windows is None else windows:
            output = self.run(index, self.hidden[i])
            check_finite(output, f"the output of block {index}")
            self.hidden[i] = output


class Calibration:
    """The streams of this rank.

    Args:
        model: the model.
        blocks: its decoder blocks.
        windows: token ids of all ranks, [windows, seq_len]; the first `config.num_samples` calibrate.
        config: method and settings.
        source: gives the first blocks and the buffer.
        world: the ranks that divide the windows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        windows: Tensor,
        config: CompressionConfig,
        source: BlockSource,
        world: World,
    ) -> None:
        self._blocks, self._config, self._world = blocks, config, world
        calibrating = windows[: config.num_samples]
        self._uses = window_uses(config.method, len(calibrating), len(windows) - len(calibrating))
        mine = share(world, len(windows))
        unseen = _unseen(mine, len(calibrating))
        self._compressed = range(len(mine))
        self._dense = range(len(mine), len(mine) + len(unseen))
        probes = calibrating[: PROBES if config.bits_per_weight is not None else 0, :PROBE_TOKENS]
        windows = windows[[*mine, *unseen]]
        with source.outside():
            self._windows = Stream(model, blocks, windows, source, source.activations(len(windows)))
            self._probes = Stream(model, blocks, probes, source)

    def sensitivity(self, index: int, layers: dict[str, nn.Linear]) -> dict[str, float]:
        """How sensitive a block is to its target layers, by name; empty where budgets are even."""
        if not layers or not len(self._probes.hidden):
            return {}
        block, call, probes = self._blocks[index], self._probes.calls[index], self._probes.hidden
        seed = self._config.seed
        if next(block.parameters()).device.type != "cpu":
            return sensitivities(layers, partial(call, block), probes, seed)
        # On CPUs backward products of float16 are hundreds of times slower, as are bfloat16's where none is built in.
        with in_float32(block):
            return sensitivities(layers, partial(call.widened(), block), (states.float() for states in probes), seed)

    def stats(
        self, index: int, layers: dict[str, nn.Linear], owners: Mapping[str, int]
    ) -> dict[str, LayerStats | None]:
        """Statistics of a block's target layers; the hidden states stay in front of the block.

        Args:
            index: which block.
            layers: its target layers by name.
            owners: the rank that wants the statistics of each.

        Returns:
            By name, of the layers that a fitted token has reached; None where another rank has them.
        """
        if not layers:
            return {}
        return collect_stats(
            self._blocks[index],
            layers,
            lambda i: self._windows.run(index, self._windows.hidden[i]),
            self._uses,
            with_gram=get_method(self._config.method).needs_gram,
            seed=self._config.seed,
            world=self._world,
            owners=owners,
        )

    def propagate_dense(self, index: int) -> None:
        """Run a block that is still dense on the copies of the unseen windows."""
        self._windows.propagate(index, self._dense)

    def propagate(self, index: int) -> None:
        """Run a block, whose weights are Ŵ by now, on everything else."""
        self._windows.propagate(index, self._compressed)
        self._probes.propagate(index)

    def drift(self) -> Drift | None:
        """The drift behind the block that all have passed, the same on every rank; None without unseen windows."""
        if Use.MEASURE not in self._uses:
            return None
        hidden, last = self._windows.hidden, self._compressed[len(self._compressed) - len(self._dense) :]
        mine = [Squares.of(hidden[dense], hidden[i]) for i, dense in zip(last, self._dense, strict=True)]
        return Drift.of([squares for theirs, _ in self._world.gather(mine, {}) for squares in theirs])


def _unseen(mine: range, calibrating: int) -> range:
    """The windows of a rank's share that calibrate nothing."""
    return range(max(mine.start, min(calibrating, mine.stop)), mine.stop)


def windows_held(calibrating: int, unseen: int, ranks: int = 1) -> list[int]:
    """How many windows' hidden states each rank holds; the unseen ones count twice.

    Args:
        calibrating: number of windows that calibrate.
        unseen: number of windows after them.
        ranks: processes that divide the windows.
    """
    shares = [share(World(rank, ranks), calibrating + unseen) for rank in range(ranks)]
    return [len(mine) + len(_unseen(mine, calibrating)) for mine in shares]


def window_uses(method: str, calibrating: int, unseen: int) -> list[Use]:
    """What each window is there for; at least one is kept back for the methods that need it, but not the only one.

    Args:
        method: name of the method.
        calibrating: number of windows that calibrate.
        unseen: number of windows after them.
    """
    kept_back = 0
    if get_method(method).needs_held_out:
        kept_back = max(calibrating // HELD_OUT_SHARE, min(1, calibrating - 1))
    fitted = calibrating - kept_back
    return [Use.FIT] * fitted + [Use.HOLD_BACK] * kept_back + [Use.MEASURE] * unseen
