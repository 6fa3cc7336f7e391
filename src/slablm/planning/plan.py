"""`plan`: everything about a compression before it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from slablm.calibration.windows import check_length
from slablm.compression.layer import compress_layer
from slablm.compression.options import RunOptions
from slablm.compression.preparation import check_packable, check_ranks, with_value_dtype
from slablm.config import CompressionConfig
from slablm.dense import loading
from slablm.dense.targets import Targets, select_targets
from slablm.errors import SlabError
from slablm.methods import LayerStats, get_method
from slablm.planning.checks import Known, Outlook, look_ahead
from slablm.planning.skeleton import open_skeleton
from slablm.planning.timing import Duration, estimate
from slablm.system.memory import give_back, resident_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CARD_BYTES = 1200


@dataclass(frozen=True)
class Plan:
    """What a compression will give, take and need.

    Attributes:
        source: the model.
        config: the settings, the value type filled in.
        targets: layers to compress, and those left dense with the reason.
        outlook: size, memory and disk; None if the settings do not fit the shapes.
        duration: an estimate; None if it was not asked for.
        whole_because: why the whole model will be in memory; empty if it is streamed.
        notes: what is worth knowing.
        problems: what makes it impossible, one line each; empty if it can be done.
    """

    source: str
    config: CompressionConfig
    targets: Targets
    outlook: Outlook | None
    duration: Duration | None
    whole_because: str
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        result: dict[str, Any] = {
            "possible": not self.problems,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "layers": [name for names in self.targets.names for name in names],
            "left_dense": self.targets.left_dense,
            "whole_model_in_memory": self.whole_because or None,
            "config": self.config.to_dict(),
        }
        if self.outlook is not None:
            result |= _numbers(self.outlook)
        if self.duration is not None:
            result["seconds_estimate"] = vars(self.duration) | {"total": self.duration.total}
        return result


def plan(
    source: str,
    config: CompressionConfig | None = None,
    *,
    options: RunOptions | None = None,
    out: str | Path = "out",
    measure_speed: bool = True,
) -> Plan:
    """Say what `compress` would give, take and need; no weight is read.

    Args:
        source: hub id, folder (config.json is enough), ``.gguf`` file or ``smollm2``.
        config: settings of the compression.
        options: the other options of a run, such as `max_memory`; `world` tells how many ranks there will be.
        out: where the result is to be: only the free space there is looked at.
        measure_speed: whether to estimate the time, which takes a few seconds.

    Raises:
        SlabError: there is no such model, or the settings are wrong whatever the machine.
    """
    config, options = config or CompressionConfig(), options or RunOptions()
    check_packable(config.method)
    check_ranks(config, options.world.size)
    loading.check_device(options.device)
    skeleton = open_skeleton(source, options.dtype, options.revision, trust_remote_code=options.trust_remote_code)
    model, whole = skeleton.model, skeleton.whole_because
    if config.calibration == "self":
        whole = whole or "it writes its own calibration text"
    targets, config, dtype = select_targets(model, config), with_value_dtype(config, model), model.dtype
    try:
        check_length(model, config.seq_len)
        problems = []
    except SlabError as error:
        problems = [str(error)]
    other = _CARD_BYTES + (_saved_bytes(skeleton.tokenizer) if skeleton.tokenizer is not None else 0)
    _use_libraries(config.method, dtype)
    give_back()
    outlook, more = look_ahead(
        model,
        targets,
        config,
        options,
        Path(out),
        Known(bool(whole), skeleton.file_bytes, skeleton.stored_itemsize, resident_bytes() or 0, other),
    )
    duration = None
    if measure_speed and outlook is not None:
        ranks = options.world.size
        duration = estimate(outlook.rehearsal, outlook.size, config, dtype, torch.device(options.device), ranks)
    return Plan(source, config, targets, outlook, duration, whole, skeleton.notes, (*problems, *more))


def _use_libraries(method: str, dtype: torch.dtype) -> None:
    """Run what a compression runs, tiny: code that is mapped at its first use counts as memory of the process."""
    weight = torch.randn(64, 256).to(dtype)
    gram = torch.eye(256)
    stats = LayerStats(torch.ones(256), 1, torch.randn(8, 256), gram, gram)
    ratio = None if get_method(method).takes_true_bits else 0.3
    compress_layer("trial", weight, stats, CompressionConfig(method, iterations=1, ratio=ratio))
    heads = functional.linear(torch.randn(1, 4, 64, 256).to(dtype), weight)
    functional.silu(functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True))


def _saved_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of the files that a tokenizer saves."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).iterdir())


def _numbers(outlook: Outlook) -> dict[str, Any]:
    size, memory, disk = outlook.size, outlook.memory, outlook.disk
    return {
        "weights": size.weights,
        "model_weights": size.model_weights,
        "bits_per_weight": size.bits_per_weight,
        "model_bits_per_weight": size.model_bits_per_weight,
        "compression_ratio": size.compression_ratio,
        "head_bits": size.head_bits,
        "bytes_on_disk": size.file_bytes,
        "files": size.files,
        "dense_bytes": size.dense_bytes,
        "memory": {
            "peak_bytes": memory.peak_bytes,
            "base_bytes": memory.base_bytes,
            "largest_phase": memory.largest.name,
            "device_peak_bytes": memory.device_phase.total(on_device=True),
            "phases": {phase.name: [vars(part) for part in phase.parts] for phase in memory.phases},
        },
        "disk": vars(disk) | {"needed_bytes": disk.needed_bytes},
    }
