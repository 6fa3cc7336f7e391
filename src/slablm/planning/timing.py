"""How long it will take: an estimate from a few seconds of measuring on this machine.

Three rates are measured: seconds per weight of the real decomposition (once for every width of the model, on a slice
of a few hundred rows), floating-point operations per second of a matrix product, bytes per second of an elementwise
operation. The rest is counting: every block runs twice on every window. Reading and writing files is not included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.float32 import fast_float32
from slablm.layerwise import compress_layer
from slablm.methods import NEEDS_GRAM, LayerStats, row_budget
from slablm.planning.rehearsal import Rehearsal
from slablm.planning.size import Size

_TRIAL_WEIGHTS = 1 << 20
_LEAST_ROWS = 64
_ROUNDS = 3
_PRODUCT = 1024
_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Duration:
    """An estimate, in seconds.

    Attributes:
        calibration: both runs of all windows through all blocks.
        decomposition: all layers.
    """

    calibration: float
    decomposition: float

    @property
    def total(self) -> float:
        """Both."""
        return self.calibration + self.decomposition


@torch.no_grad()
@fast_float32()
def estimate(
    rehearsal: Rehearsal, size: Size, config: CompressionConfig, dtype: torch.dtype, device: torch.device
) -> Duration:
    """Measure the rates and add up.

    Args:
        rehearsal: what calibration takes.
        size: the layers.
        config: the settings.
        dtype: type of the model.
        device: compute device.
    """
    a = torch.randn(_PRODUCT, _PRODUCT, device=device).to(dtype)
    flops = 2 * _PRODUCT**3 / _seconds(lambda: a @ a, device)
    b = torch.randn(_ELEMENTS, device=device)
    speed = b.nbytes / _seconds(lambda: b * 1.5, device)
    runs = [(block.count, work) for block in rehearsal.blocks for work in (block.statistics, block.propagation)]
    window = sum(count * (work.flops / flops + work.touched_bytes / speed) for count, work in runs)
    by_width: dict[int, int] = {}
    tallest: dict[int, int] = {}
    for layer in size.layers:
        m, n = layer.shape
        by_width[n] = by_width.get(n, 0) + layer.weights
        tallest[n] = max(tallest.get(n, 0), m)
    seconds = sum(w * _per_weight((tallest[n], n), config, dtype, device) for n, w in by_width.items())
    return Duration(config.num_samples * window, seconds)


def _per_weight(shape: tuple[int, int], config: CompressionConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of the decomposition, packing and the output error included, per weight."""
    m, n = shape
    rows = min(m, max(_LEAST_ROWS, _TRIAL_WEIGHTS // n))
    try:
        row_budget((rows, n), config)
    except SlabError:  # factors cost more per weight in a slice than in the whole matrix
        rows = m
    weight = torch.randn(rows, n, device=device).to(dtype)
    sample = torch.randn(512, n, device=device)
    gram = sample.T @ sample + torch.eye(n, device=device) if config.method in NEEDS_GRAM else None
    stats = LayerStats(torch.ones(n, device=device), 1, sample, gram, gram)
    rounds = min(_ROUNDS, config.iterations)

    def run(iterations: int) -> float:
        trial = replace(config, iterations=iterations)
        return _seconds(lambda: compress_layer("trial", weight, stats, trial), device, repeats=1)

    once = run(1)
    each = max(run(rounds) - once, 0.0) / (rounds - 1) if rounds > 1 else 0.0
    return (once + each * (config.iterations - 1)) / weight.numel()


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The shortest time of several tries, after one that does not count."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(repeats))
