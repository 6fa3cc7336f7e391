"""Measure many methods on one model, every cell of the grid (`slablm.comparison.cells`) once.

Every cell starts from the dense model, loaded anew, so that one model is in memory at a time. Results are appended to
a file as they come (`slablm.comparison.records`); a cell whose key is there already is not computed again. The key is a
digest of all that changes the numbers: settings, weights, calibration and evaluation tokens, tasks, `NUMBERS_VERSION`
and the method's version, or a rival's file.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from slablm.checkpoint import integrity
from slablm.comparison import rivals
from slablm.comparison.cells import Cell
from slablm.comparison.records import OnText, Record, ResultsFile
from slablm.errors import SlabError
from slablm.methods import get_method
from slablm.methods.budget import PAPER_VALUE_BITS
from slablm.system.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slablm.checkpoint.layer_report import LayerReport
    from slablm.config import CompressionConfig
    from slablm.evaluation.divergence import DenseOutputs
    from slablm.evaluation.drift import DenseStreams

# To be raised whenever a change of the methods or of the evaluation changes results, or the form of a record changes:
# old cells are then measured again.
NUMBERS_VERSION = 2
# Of the main text: the drift needs few, and the hidden states behind all blocks are kept of each.
DRIFT_WINDOWS = 2
_ORIGIN = ("_name_or_path", "_commit_hash", "architectures", "transformers_version")

Step = Callable[[str, int, int], None]

OnCell = Callable[[Record, bool], None]


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
        base: settings that all cells share, of which rivals have their targets.
        calibration: gives the token ids of a draw, [windows, seq_len], as `calibration_windows` does.
        texts: token ids to evaluate on by the text's name, [windows, seq_len] each; the main one first.
        tasks: zero-shot tasks.
        bos: whether questions of the tasks begin with a BOS token where the tokenizer begins texts with one.
        description: model, texts and so on in words, for the records.
    """

    load: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    model_digest: str
    base: CompressionConfig
    calibration: Callable[[CompressionConfig], Tensor]
    texts: dict[str, Tensor]
    tasks: Tasks
    bos: bool
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
    if settings.get("head_bits") == 16:  # keys of before know nothing of it
        del settings["head_bits"]
    tasks = conditions.tasks.identity()
    return _digest(
        {
            "numbers": NUMBERS_VERSION,
            "settings": settings,
            "method": get_method(cell.method).version if cell.config else None,
            "rival": rivals.digest(cell.rival) if cell.rival else None,
            "model": conditions.model_digest,
            "calibration": integrity.digest(conditions.calibration(cell.config)) if cell.config else None,
            "evaluation": [integrity.digest(windows) for windows in conditions.texts.values()],
            "tasks": tasks and [tasks, conditions.bos],
        }
    )


def measure_cells(
    cells: Mapping[Cell, str], conditions: Conditions, results: ResultsFile, on_cell: OnCell, on_step: Step
) -> list[Record]:
    """Measure what is not in the file yet.

    Args:
        cells: from `Grid.cells`, the dense model first; with the `cell_key` of each.
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
    dense: _Dense | None = None
    for cell, key in cells.items():
        record = results.get(key)
        measured = record is None
        if record is None:
            try:
                dense = dense or _Dense.of(conditions, on_step)
                record = _measure(cell, key, conditions, dense, on_step)
            except SlabError as error:
                raise SlabError(f"{cell.label}: {error} (finished cells are kept in {results.path})") from error
            results.append(record)
        # The texts' names may have been others when it was measured.
        record = replace(record, texts=dict(zip(conditions.texts, record.texts.values(), strict=True)))
        records.append(record)
        on_cell(record, measured)
    return records


@dataclass(frozen=True)
class _Dense:
    """What is kept of the dense model: outputs on all texts, and hidden states on a few windows of the main one."""

    outputs: DenseOutputs
    streams: DenseStreams

    @classmethod
    def of(cls, conditions: Conditions, on_step: Step) -> _Dense:
        from slablm.evaluation.divergence import DenseOutputs
        from slablm.evaluation.drift import DenseStreams

        model = conditions.load()
        outputs = DenseOutputs.of(model, conditions.texts, partial(on_step, "evaluating the dense model"))
        main = next(iter(conditions.texts.values()))
        streams = DenseStreams.of(model, main[:DRIFT_WINDOWS])
        del model
        gc.collect()  # models hold reference cycles: without this two or three of them would be in memory
        return cls(outputs, streams)


def _measure(cell: Cell, key: str, conditions: Conditions, dense: _Dense, on_step: Step) -> Record:
    """Load, compress, evaluate."""
    from slablm.checkpoint.layer_report import size_summary
    from slablm.dense.targets import select_targets
    from slablm.system.memory import peak_resident_bytes

    clock = _Clock()
    model = conditions.load()
    bits = whole = float(PAPER_VALUE_BITS)
    if cell.rival:
        targets = [name for names in select_targets(model, conditions.base).names for name in names]
        bits = rivals.true_bits(cell.rival, model, targets).bits_per_weight
        whole = rivals.whole_size(cell.rival, model).bits_per_weight
        model = rivals.load(cell.rival, model)
    clock.lap("load")
    reports = _compress(model, cell, conditions, on_step)
    clock.lap("compress")
    texts = _on_texts(model, cell, dense.outputs, on_step)
    drift = () if cell.dense else tuple(dense.streams.drift(model))
    clock.lap("perplexity")
    accuracies = _accuracies(model, conditions)
    clock.lap("tasks")
    weights = sum(parameter.numel() for parameter in model.parameters())
    del model
    gc.collect()
    sizes = size_summary(reports) if reports else {"compression_ratio": 0.0, "bits_per_weight": bits}
    if reports:
        whole = PAPER_VALUE_BITS - sizes["weights"] / weights * (PAPER_VALUE_BITS - sizes["bits_per_weight"])
    return Record(
        key=key,
        cell=cell,
        conditions=conditions.description,
        compression_ratio=sizes["compression_ratio"],
        bits_per_weight=sizes["bits_per_weight"],
        texts=texts,
        layer_errors={report.name: report.output_error for report in reports},
        unseen_errors={r.name: r.unseen_error for r in reports if r.unseen_error is not None},
        drift=drift,
        seconds=clock.laps,
        peak_memory_bytes=peak_resident_bytes(),
        versions=versions(),
        accuracies=accuracies,
        model_bits_per_weight=whole,
    )


def _on_texts(model: PreTrainedModel, cell: Cell, dense: DenseOutputs, on_step: Step) -> dict[str, OnText]:
    if cell.dense:
        return {name: OnText(text.perplexity) for name, text in dense.texts.items()}
    compared = dense.compare(model, partial(on_step, "evaluating"))
    return {
        name: OnText(result, result.value / dense.texts[name].perplexity.value, divergence)
        for name, (result, divergence) in compared.items()
    }


def _compress(model: PreTrainedModel, cell: Cell, conditions: Conditions, on_step: Step) -> list[LayerReport]:
    """Compress in place; all layers are linear with Ŵ in the end. Nothing is done to the dense model."""
    from slablm.compression.blocks import compress_blocks
    from slablm.compression.preparation import prepare_model
    from slablm.dense.targets import select_targets
    from slablm.runtime.replace_module import unpack_layers

    if cell.config is None:
        return []
    targets = select_targets(model, cell.config)
    config = prepare_model(model, targets, cell.config)
    reports = compress_blocks(
        model,
        targets,
        conditions.calibration(config),
        config,
        lambda done, total, report: on_step("compressing", done, total),
    )
    unpack_layers(model, model.dtype)
    return reports


def _accuracies(model: PreTrainedModel, conditions: Conditions) -> dict[str, dict[str, Any]] | None:
    if not conditions.tasks:
        return None
    from slablm.evaluation.zeroshot import evaluate_tasks

    tasks = conditions.tasks
    results = evaluate_tasks(model, conditions.tokenizer, tasks.names, tasks.files, tasks.limit, bos=conditions.bos)
    return {task: result.to_dict() for task, result in results.items()}


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
