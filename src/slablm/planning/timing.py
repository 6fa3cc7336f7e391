"""How long it will take: an estimate from a few seconds of measuring on this machine.

Three rates are measured: seconds per weight of the real decomposition (once for every width of the model, on a slice
of a few hundred rows; with error feedback, on two smaller matrices), floating-point operations per second of a matrix
product, bytes per second of an elementwise operation. The rest is counting: every block runs twice on every window, and
once more on those that calibrate nothing.
Reading and writing files is not included, nor are the sensitivities of a block.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from slablm.calibration.stream import windows_held
from slablm.calibration.windows import UNSEEN_WINDOWS, windows_wanted
from slablm.compression.layer import compress_layer, cost
from slablm.config import DEFAULT_RATIO, CompressionConfig
from slablm.errors import SlabError
from slablm.methods import LayerStats, get_method, storage
from slablm.methods.allocation import Demand
from slablm.planning.rehearsal import Rehearsal
from slablm.planning.size import Size
from slablm.system.distributed import assign
from slablm.system.float32 import fast_float32

_TRIAL_WEIGHTS = 1 << 20
_LEAST_ROWS = 64
_ROUNDS = 3
_SMALL = 384
_PRODUCT = 1024
_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Duration:
    """An estimate, in seconds.

    Attributes:
        calibration: all runs of all windows through all blocks.
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
    rehearsal: Rehearsal,
    size: Size,
    config: CompressionConfig,
    dtype: torch.dtype,
    device: torch.device,
    ranks: int = 1,
) -> Duration:
    """Measure the rates and add up.

    Args:
        rehearsal: what calibration takes.
        size: the layers.
        config: the settings.
        dtype: type of the model.
        device: compute device.
        ranks: processes that share the work, each as fast as this one.
    """
    a = torch.randn(_PRODUCT, _PRODUCT, device=device).to(dtype)
    flops = 2 * _PRODUCT**3 / _seconds(lambda: a @ a, device)
    b = torch.randn(_ELEMENTS, device=device)
    speed = b.nbytes / _seconds(lambda: b * 1.5, device)
    windows = windows_wanted(config)
    runs = [(windows * block.count, block.statistics) for block in rehearsal.blocks]
    runs += [((windows + UNSEEN_WINDOWS) * block.count, block.propagation) for block in rehearsal.blocks]
    calibration = sum(count * (work.flops / flops + work.touched_bytes / speed) for count, work in runs)
    by_width: dict[int, int] = {}
    tallest: dict[int, int] = {}
    for layer in size.layers:
        m, n = layer.shape
        by_width[n] = by_width.get(n, 0) + layer.weights
        tallest[n] = max(tallest.get(n, 0), m)
    seconds = sum(w * _per_weight((tallest[n], n), config, dtype, device) for n, w in by_width.items())
    share = max(windows_held(config.num_samples, UNSEEN_WINDOWS, ranks)) / (config.num_samples + 2 * UNSEEN_WINDOWS)
    return Duration(calibration * share, seconds * busiest_share(rehearsal, size, config.method, ranks))


def busiest_share(rehearsal: Rehearsal, size: Size, method: str, ranks: int) -> float:
    """The part of all decomposition that the busiest rank of every block does.

    Args:
        rehearsal: what the blocks are.
        size: the layers.
        method: its name.
        ranks: processes that divide the layers of a block.
    """
    shapes = {layer.name: layer.shape for layer in size.layers}
    longest = total = 0.0
    for block in rehearsal.blocks:
        costs = {name: cost(shapes[name], method) for names, _ in block.inputs for name in names}
        owners = assign(costs, ranks)
        loads = [sum(costs[name] for name in costs if owners[name] == rank) for rank in range(ranks)]
        longest, total = longest + block.count * max(loads), total + block.count * sum(loads)
    return longest / total


def _per_weight(shape: tuple[int, int], config: CompressionConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of the decomposition, packing and the output error included, per weight."""
    if get_method(config.method).needs_gram:
        return _per_weight_with_feedback(shape, config, dtype, device)
    m, n = shape
    rows = min(m, max(_LEAST_ROWS, _TRIAL_WEIGHTS // n))
    try:
        storage((rows, n), config)
    except SlabError:  # factors cost more per weight in a slice than in the whole matrix
        rows = m
    rounds = min(_ROUNDS, config.iterations)

    def run(iterations: int) -> float:
        return _trial((rows, n), replace(config, iterations=iterations), dtype, device)

    once = run(1)
    each = max(run(rounds) - once, 0.0) / (rounds - 1) if rounds > 1 else 0.0
    return (once + each * (config.iterations - 1)) / (rows * n)


def _per_weight_with_feedback(
    shape: tuple[int, int], config: CompressionConfig, dtype: torch.dtype, device: torch.device
) -> float:
    """The same for methods whose time grows with n² and n³: no slice of rows tells it, and a whole matrix takes long.

    Two smaller matrices of the same proportions tell the two parts apart: with n = `_SMALL` and twice that,
    t(n) = a n² + b n³.
    """
    m, n = shape
    if n <= 2 * _SMALL:
        return _trial(shape, config, dtype, device) / (m * n)
    small, large = (_trial((max(1, m * width // n), width), config, dtype, device) for width in (_SMALL, 2 * _SMALL))
    cubic = max((large - 4 * small) / 4, 0.0)  # of the smaller one; 4 times the squares, 8 times the cubes
    square, scale = max(small - cubic, 0.0), n / _SMALL
    return (square * scale**2 + cubic * scale**3) / (m * n)


def _trial(shape: tuple[int, int], config: CompressionConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds that a random matrix takes."""
    rows, n = shape
    weight = torch.randn(rows, n, device=device).to(dtype)
    sample = torch.randn(512, n, device=device)
    gram = sample.T @ sample + torch.eye(n, device=device) if get_method(config.method).needs_gram else None
    stats = LayerStats(torch.ones(n, device=device), 1, sample, gram, gram, sample)
    try:
        storage(shape, config)
    except SlabError:  # factors and scales weigh more in a small matrix
        if config.bits_per_weight is None:
            config = replace(config, ratio=DEFAULT_RATIO)
        else:
            config = replace(config, bits_per_weight=Demand.of(shape).sizes[-1])
    return _seconds(lambda: compress_layer("trial", weight, stats, config), device, repeats=1)


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
