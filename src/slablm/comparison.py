"""Measure many methods on one model, every cell of the grid once.

The grid, for the paper's Table I by default:

- the dense model;
- every pruning method, unstructured, at every ratio;
- every pruning method with every N:M pattern, at ratio 1 − N/M and no other. That is the ratio the pattern stands for:
  a plain pruner with 2:4 removes half of the weights whatever smaller ratio one asks for, and above it the pattern is
  hardly felt. So 2:4 and 4:8 are cells at 50 %, also when 0.5 is not among the ratios;
- `slab+` also with every budget in true bits;
- every quantizer (`rtn`, `gptq`) with every number of bits and every group size; ratio and pattern mean nothing to it.

Every cell starts from the dense model, loaded anew, so that one model is in memory at a time. Results are appended to
a file as they come (`slablm.records`); a cell whose key is there already is not computed again. The key is a digest of
all that changes the numbers: settings, weights, calibration and evaluation tokens, tasks, `NUMBERS_VERSION` and
`METHOD_VERSIONS`.
"""

from __future__ import annotations

import gc
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slablm import integrity
from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods import get_method
from slablm.methods.budget import PAPER_VALUE_BITS
from slablm.records import QUANTIZERS, Cell, Record, ResultsFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slablm.layer_report import LayerReport

# To be raised whenever a change of the methods or of the evaluation changes results, or the form of a record changes:
# old cells are then measured again.
NUMBERS_VERSION = 1
# The same for a change of one method alone.
METHOD_VERSIONS = {"slab+": 3}
_ORIGIN = ("_name_or_path", "_commit_hash", "architectures", "transformers_version")

Step = Callable[[str, int, int], None]
# The method whose size can be given in true bits.
BY_TRUE_BITS = "slab+"

OnCell = Callable[[Record, bool], None]


@dataclass(frozen=True)
class Grid:
    """What to compare.

    Args:
        methods: names of methods.
        ratios: the paper's compression ratios, of unstructured cells.
        patterns: ``unstructured`` and N:M patterns.
        value_bits: bits per code, of the quantizers.
        group_sizes: columns that share a scale, of the quantizers.
        budgets: true bits per weight of further cells of `slab+`.
    """

    methods: tuple[str, ...]
    ratios: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)
    patterns: tuple[str, ...] = ("unstructured", "2:4", "4:8")
    value_bits: tuple[int, ...] = (3, 4, 8)
    group_sizes: tuple[int, ...] = (128,)
    budgets: tuple[float, ...] = ()

    def cells(self, base: CompressionConfig) -> list[Cell]:
        """All cells in the order they are measured: dense, then setting by setting, every method of it.

        Args:
            base: all other settings.

        Raises:
            SlabError: an unknown method, a ratio or pattern out of range, or nothing to measure.
        """
        for method in self.methods:
            get_method(method)
        pruners = [method for method in self.methods if method not in QUANTIZERS]
        quantizers = [method for method in self.methods if method in QUANTIZERS]
        configs = [replace(base, method=method, **at) for at in self._pruner_settings() for method in pruners]
        configs += [replace(base, method=method, **at) for at in self._quantizer_settings() for method in quantizers]
        if self.budgets and BY_TRUE_BITS not in self.methods:
            raise SlabError(f"a budget in true bits is for method {BY_TRUE_BITS!r}: name it as well")
        configs += [replace(base, method=BY_TRUE_BITS, bits_per_weight=budget) for budget in self.budgets]
        if not configs:
            raise SlabError("nothing to compare: name at least one method, and a ratio and pattern for it")
        # The same value given twice is one cell.
        return [Cell(None), *map(Cell, dict.fromkeys(configs))]

    def _pruner_settings(self) -> Iterator[dict[str, Any]]:
        for pattern in self.patterns:
            n_of_m = CompressionConfig(pattern=pattern).n_of_m
            ratios = self.ratios if n_of_m is None else [1 - n_of_m.survivors / n_of_m.group]
            yield from ({"ratio": ratio, "pattern": pattern} for ratio in ratios)

    def _quantizer_settings(self) -> Iterator[dict[str, Any]]:
        return ({"value_bits": bits, "group_size": size} for bits in self.value_bits for size in self.group_sizes)


@dataclass(frozen=True)
class Tasks:
    """Zero-shot tasks to measure; none by default.

    Attributes:
        names: tasks known to lm-eval, or ``slab-paper``.
        files: local task files.
        limit: only the first questions of each task.
    """

    names: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    limit: int | None = None

    def __bool__(self) -> bool:
        return bool(self.names or self.files)

    def identity(self) -> Any:
        """What of them changes the numbers: names, the files' contents, the limit.

        Raises:
            SlabError: a file cannot be read.
        """
        try:
            digests = [hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest() for file in self.files]
        except OSError as error:
            raise SlabError(f"task file {error.filename} cannot be read: {error.strerror}") from error
        names = [file.stem for file in self.files]
        return [list(self.names), names, digests, self.limit] if self else None


@dataclass(frozen=True)
class Conditions:
    """What all cells of one comparison share.

    Attributes:
        load: gives the dense model, new each time, in eval mode.
        tokenizer: the model's.
        model_digest: from `model_digest`.
        calibration: token ids, [windows, seq_len], from `calibration_windows`.
        evaluation: token ids, [windows, seq_len].
        tasks: zero-shot tasks.
        description: model, texts and so on in words, for the records.
    """

    load: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    model_digest: str
    calibration: Tensor
    evaluation: Tensor
    tasks: Tasks
    description: dict[str, Any]


def model_digest(model: PreTrainedModel) -> str:
    """Digest of a model's settings, parameters and buffers, and of the type of its device, 16 hexadecimal digits."""
    settings = model.config.to_dict()
    # Where it came from and which version wrote it changes nothing.
    settings = {name: repr(value) for name, value in settings.items() if name not in _ORIGIN}
    tensors = {name: integrity.digest(tensor) for name, tensor in model.state_dict().items()}
    return _digest([type(model).__name__, model.device.type, settings, tensors])


def cell_key(cell: Cell, conditions: Conditions) -> str:
    """Digest of everything that changes the numbers of a cell.

    Texts count by their tokens and models by their weights, so that neither a moved file nor another name for the same
    model costs a new measurement. The dense model does not depend on calibration.
    """
    settings = cell.config.to_dict() if cell.config else {}
    settings.pop("calibration", None)
    calibrating = conditions.calibration[: cell.config.num_samples] if cell.config else None
    return _digest(
        {
            "numbers": NUMBERS_VERSION,
            "settings": settings,
            **({"method": METHOD_VERSIONS[cell.method]} if cell.method in METHOD_VERSIONS else {}),
            "model": conditions.model_digest,
            "calibration": None if calibrating is None else integrity.digest(calibrating),
            "evaluation": integrity.digest(conditions.evaluation),
            "tasks": conditions.tasks.identity(),
        }
    )


def measure_cells(
    cells: Sequence[Cell], conditions: Conditions, results: ResultsFile, on_cell: OnCell, on_step: Step
) -> list[Record]:
    """Measure what is not in the file yet.

    Args:
        cells: from `Grid.cells`, the dense model first.
        conditions: what they share.
        results: where records come from and go to.
        on_cell: called after each cell with its record and whether it was measured just now.
        on_step: called within a cell with (what, steps done, steps in all).

    Returns:
        One record per cell, in the order of `cells`.

    Raises:
        SlabError: a cell cannot be computed; the message names it, finished ones are kept.
    """
    records: list[Record] = []
    for cell in cells:
        key = cell_key(cell, conditions)
        record = results.get(key)
        measured = record is None
        if record is None:
            try:
                record = _measure(cell, key, conditions, records[0] if records else None, on_step)
            except SlabError as error:
                raise SlabError(f"{cell.label}: {error} (finished cells are kept in {results.path})") from error
            results.append(record)
        records.append(record)
        on_cell(record, measured)
    return records


def _measure(cell: Cell, key: str, conditions: Conditions, dense: Record | None, on_step: Step) -> Record:
    """Load, compress, evaluate."""
    from slablm.evaluation import perplexity
    from slablm.layer_report import size_summary
    from slablm.memory import peak_resident_bytes

    clock = _Clock()
    model = conditions.load()
    clock.lap("load")
    reports = _compress(model, cell, conditions, on_step)
    clock.lap("compress")
    result = perplexity(model, conditions.evaluation, lambda done, total: on_step("evaluating", done, total))
    clock.lap("perplexity")
    accuracies = _accuracies(model, conditions)
    clock.lap("tasks")
    del model
    gc.collect()  # models hold reference cycles: without this two or three of them would be in memory
    sizes = size_summary(reports) if reports else {"compression_ratio": 0.0, "bits_per_weight": float(PAPER_VALUE_BITS)}
    return Record(
        key=key,
        cell=cell,
        conditions=conditions.description,
        compression_ratio=sizes["compression_ratio"],
        bits_per_weight=sizes["bits_per_weight"],
        perplexity=result,
        ratio_to_dense=result.value / dense.perplexity.value if dense else 1.0,
        layer_errors={report.name: report.output_error for report in reports},
        unseen_errors={r.name: r.unseen_error for r in reports if r.unseen_error is not None},
        seconds=clock.laps,
        peak_memory_bytes=peak_resident_bytes(),
        versions=versions(),
        accuracies=accuracies,
    )


def _compress(model: PreTrainedModel, cell: Cell, conditions: Conditions, on_step: Step) -> list[LayerReport]:
    """Compress in place; all layers are linear with Ŵ in the end. Nothing is done to the dense model."""
    from slablm.api import prepare_model
    from slablm.layerwise import compress_blocks, replace_module
    from slablm.modules import SlabLinear
    from slablm.targets import select_targets

    if cell.config is None:
        return []
    targets = select_targets(model, cell.config)
    config = prepare_model(model, targets, cell.config)
    reports = compress_blocks(
        model, targets, conditions.calibration, config, lambda done, total, report: on_step("compressing", done, total)
    )
    # The same numbers; but to unpack every layer anew for each of thousands of short questions would take hours.
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SlabLinear):
            replace_module(model, name, layer.unpacked(model.dtype))
    return reports


def _accuracies(model: PreTrainedModel, conditions: Conditions) -> dict[str, dict[str, Any]] | None:
    if not conditions.tasks:
        return None
    from slablm.evaluation.zeroshot import evaluate_tasks

    tasks = conditions.tasks
    results = evaluate_tasks(model, conditions.tokenizer, tasks.names, tasks.files, tasks.limit)
    return {task: result.to_dict() for task, result in results.items()}


def versions() -> dict[str, str]:
    """Versions of what the numbers come from."""
    import transformers

    from slablm import __version__

    return {
        "slablm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


def _digest(data: Any) -> str:
    text = json.dumps(data, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
