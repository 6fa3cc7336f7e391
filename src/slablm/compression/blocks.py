"""The one loop over the decoder: capture → decompose → swap → propagate.

Blocks are compressed in order. The statistics of a block come from the inputs that the *already compressed* blocks in
front of it produce, so that every layer is fitted to what it will really see:

    for each block:  run it dense on all windows, collecting statistics
                     decompose its linear layers
                     run it compressed on all windows; the outputs are the next block's inputs

A few windows that calibrate nothing also walk through the dense blocks, to see how far the two streams drift apart.

Where a block's weights come from, and where the finished block goes, is up to a `BlockStore`. With the plain one the
model is in memory and stays there; `slablm.compression.streaming` has one that reads each block from
files and drops it again.

Several ranks can walk through the blocks together, each with its share of the windows and of a block's matrices; see
`slablm.system.distributed`.

Memory: the blocks that the store holds, the hidden states of all windows (windows × seq_len × hidden_size values, in a
bounded buffer), and the activations and statistics of one block. Attention and MLP activations exist for one window at
a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slablm.calibration.stream import Calibration
from slablm.checkpoint.layer_report import LayerReport
from slablm.checkpoint.stored import rounded, value_dtype
from slablm.compression.layer import compress_layer, cost
from slablm.compression.store import BlockStore, FinishedBlock
from slablm.config import CompressionConfig
from slablm.dense.targets import Targets, find_blocks
from slablm.errors import SlabError
from slablm.methods import LayerStats
from slablm.methods.allocation import Allowance, Demand, log_variance, log_volume
from slablm.packing import Packed
from slablm.runtime.linear import SlabLinear
from slablm.runtime.replace_module import replace_module
from slablm.system.distributed import ALONE, World, assign
from slablm.system.float32 import fast_float32
from slablm.system.memory import give_back, mapped_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Blocks and the buffers of a decomposition come and go while smaller things stay: larger ones are kept off the heap.
_HEAP_PIECE = 4 << 20

UNREACHED = "no calibration token reached it"

Progress = Callable[[int, int, LayerReport], None]


@torch.no_grad()
@fast_float32()
def compress_blocks(
    model: PreTrainedModel,
    targets: Targets,
    windows: Tensor,
    config: CompressionConfig,
    on_layer: Progress | None = None,
    store: BlockStore | None = None,
    world: World = ALONE,
) -> list[LayerReport]:
    """Compress the target layers of a model in place.

    A layer becomes a `SlabLinear`; with a yardstick it stays linear and its weight becomes Ŵ. A layer that no token
    reached, or only such as are kept back, is left dense (see `unreached`).

    Args:
        model: the dense model, in eval mode.
        targets: the layers, from `select_targets`.
        windows: token ids for all ranks, [windows, seq_len]: the first `config.num_samples` calibrate; with any that
            follow only errors are measured.
        config: method and settings.
        on_layer: called after each layer with (layers done, layers in all, report).
        store: where blocks come from and go to.
        world: the ranks that divide the work; of more than one, all get the same blocks.

    Returns:
        One report per compressed layer, in the order of the model.

    Raises:
        SlabError: NaN or Inf in activations, an impossible ratio or pattern, or no layer that a token reached.
    """
    store = store or BlockStore()
    _, blocks = find_blocks(model)
    total = sum(len(names) for names in targets.names)
    reports: list[LayerReport] = []
    allowance = None if config.bits_per_weight is None else Allowance(config.bits_per_weight)
    count = iter(range(1, total + 1))

    def note(report: LayerReport) -> None:
        if on_layer is not None:
            on_layer(next(count), total, report)

    # A run that was stopped while it put its result together has nothing left to calibrate.
    calibrated = Calibration(model, blocks, windows, config, store, world) if store.done < len(blocks) else None
    for index in range(len(blocks)):
        layers = {name: _linear(model, name) for name in targets.names[index]}
        if calibrated is not None:
            with mapped_apart(above=_HEAP_PIECE):
                store.load(index)
        if index < store.done:
            finished = store.finished(index) if world.first else FinishedBlock()
            for report in finished.reports:
                note(report)
            if calibrated is not None:
                calibrated.propagate_dense(index)
                finished = _exchange(finished, layers, world)
                _use_approximations(layers, finished.packed)
        else:
            assert calibrated is not None
            sensitivity = calibrated.sensitivity(index, layers)
            costs = {name: cost(layer.weight.shape, config.method) for name, layer in layers.items()}
            found = calibrated.stats(index, layers, assign(costs, world.size))
            calibrated.propagate_dense(index)
            layers = {name: layer for name, layer in layers.items() if name in found}
            mine = {name: stats for name, stats in found.items() if stats is not None}
            del found
            with mapped_apart(above=_HEAP_PIECE):
                volumes = {} if allowance is None else _volumes(mine, world)
                configs = world.tell(_layer_configs(layers, volumes, sensitivity, config, allowance))
                finished = _compress_layers(layers, mine, configs, note, world)
        reports += finished.reports
        if allowance is not None:
            weights = sum(layers[name].weight.numel() for name in finished.packed)
            allowance.spend(weights, 8 * sum(packed.nbytes for packed in finished.packed.values()))
        if calibrated is not None:
            _round_unreached(model, set(targets.names[index]) - {report.name for report in finished.reports}, config)
            calibrated.propagate(index)
            finished.drift = calibrated.drift()
        for name, weight in finished.packed.items():
            replace_module(model, name, SlabLinear.from_packed(weight, layers[name].bias))
        store.finish(index, finished)
    if not reports:
        raise SlabError("no calibration token reached any of the layers to compress: choose others with --targets")
    return reports


def unreached(targets: Targets, reports: Sequence[LayerReport]) -> dict[str, str]:
    """Full name → reason, of every target that was left dense after all.

    Args:
        targets: from `select_targets`.
        reports: from `compress_blocks`.
    """
    compressed = {report.name for report in reports}
    return {name: UNREACHED for names in targets.names for name in names if name not in compressed}


def _round_unreached(model: nn.Module, names: Collection[str], config: CompressionConfig) -> None:
    """Round what stays dense after all as it will be stored."""
    for name in names:
        layer = _linear(model, name)
        layer.weight.data = rounded(layer.weight.data, f"{name}.weight", value_dtype(config, layer.weight.dtype))


def _volumes(stats: dict[str, LayerStats], world: World) -> dict[str, float]:
    """`log_volume` of the inputs of every layer, from the ranks that have their statistics."""
    known: dict[int, float] = {}  # hundreds of layers (experts) may share one Gram matrix
    volumes = {}
    for name, one in stats.items():
        assert one.gram is not None
        if id(one.gram) not in known:
            known[id(one.gram)] = log_volume(one.gram / one.tokens)
        volumes[name] = known[id(one.gram)]
    return {name: volume for theirs, _ in world.gather(volumes, {}) for name, volume in theirs.items()}


def _layer_configs(
    layers: dict[str, nn.Linear],
    volumes: dict[str, float],
    sensitivity: dict[str, float],
    config: CompressionConfig,
    allowance: Allowance | None,
) -> dict[str, CompressionConfig]:
    """Settings of each layer of a block; of a budget in true bits each has its part."""
    if allowance is None:
        return dict.fromkeys(layers, config)
    known = [math.log2(value) for value in sensitivity.values()]
    unknown = sum(known) / len(known) if known else 0.0
    demands = []
    for name, layer in layers.items():
        importance = math.log2(sensitivity[name]) if name in sensitivity else unknown
        importance += log_variance(layer.weight) + volumes[name]
        demands.append(Demand.of((layer.out_features, layer.in_features), importance))
    return {
        name: replace(config, bits_per_weight=demand.sizes[chosen])
        for name, demand, chosen in zip(layers, demands, allowance.allot(demands), strict=True)
    }


def _compress_layers(
    layers: dict[str, nn.Linear],
    stats: dict[str, LayerStats],
    configs: dict[str, CompressionConfig],
    note: Callable[[LayerReport], None],
    world: World,
) -> FinishedBlock:
    """Compress the target layers of one block, each on the rank that has its statistics; `stats` is used up.

    Every layer's weight becomes Ŵ, for the propagation (dense is faster while it lasts).
    """
    finished = FinishedBlock()
    others = {name: layer for name, layer in layers.items() if name not in stats}
    for name, layer in layers.items():
        if name in others:
            continue
        # Statistics of a layer are dropped with it: a Gram matrix is larger than the weight.
        report, approximation, weight = compress_layer(name, layer.weight, stats.pop(name), configs[name])
        layer.weight.data = approximation.to(layer.weight.dtype)
        if weight is not None:
            finished.packed[name] = weight
        finished.reports.append(report)
        note(report)
        del approximation
        give_back()
    finished = _exchange(finished, layers, world)
    _use_approximations(others, finished.packed)
    for report in finished.reports:
        if report.name in others:
            note(report)
    return finished


def _exchange(mine: FinishedBlock, names: Collection[str], world: World) -> FinishedBlock:
    """The layers that all ranks have finished, in the order of `names`; with several ranks they must be packed."""
    if world.size == 1:
        return mine
    specs = {name: weight.spec for name, weight in mine.packed.items()}
    tensors = {f"{name}.{part}": t for name, weight in mine.packed.items() for part, t in weight.parts().items()}
    packed, reports = {}, {}
    for (their_reports, their_specs), theirs in world.gather((mine.reports, specs), tensors):
        for report in their_reports:
            name, spec = report.name, their_specs[report.name]
            packed[name] = spec.from_parts({part: theirs[f"{name}.{part}"] for part in spec.parts()}, name)
            reports[name] = report
    present = [name for name in names if name in reports]
    return FinishedBlock({name: packed[name] for name in present}, [reports[name] for name in present])


def _use_approximations(layers: dict[str, nn.Linear], packed: dict[str, Packed]) -> None:
    """Give layers the weights Ŵ that `_compress_layers` gave them in an earlier run: the same bits."""
    for name, weight in packed.items():
        if name in layers:
            layers[name].weight.data = weight.dense().to(layers[name].weight)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
