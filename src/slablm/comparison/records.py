"""Results as data: one record per measured cell, one JSON line per record.

A *cell* is one point of the grid of a comparison: the dense model, or a method with its settings. Everything that
changes a cell's numbers goes into its key (see `slablm.comparison.measure.cell_key`); a file of results is a set
of records with different keys, from one run or from many.

The file is only ever appended to, one whole line at a time, and synchronised to the disk after each. A process that is
killed while it writes leaves a last line without its newline; such a line is taken off, never half believed.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from slablm.comparison.cells import Cell
from slablm.comparison.rivals import Rival
from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.evaluation.divergence import Divergence
from slablm.evaluation.perplexity import Perplexity
from slablm.methods.drift import Drift


@dataclass(frozen=True)
class OnText:
    """What was measured on one text.

    Attributes:
        perplexity: loss of every window.
        ratio_to_dense: perplexity over the dense model's.
        divergence: from the dense model; None for the dense model itself.
        draws: perplexity of each draw of calibration windows, if this is the mean of several.
    """

    perplexity: Perplexity
    ratio_to_dense: float = 1.0
    divergence: Divergence | None = None
    draws: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        stderr, kl = self.perplexity.stderr, self.divergence
        return {
            "perplexity": self.perplexity.value,
            "stderr": None if math.isnan(stderr) else stderr,
            "ratio_to_dense": self.ratio_to_dense,
            "tokens": self.perplexity.tokens,
            "tokens_per_window": self.perplexity.tokens_per_window,
            "window_losses": list(self.perplexity.window_losses),
            "kl_divergence": kl and kl.to_dict() | {"window_means": list(kl.window_means)},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OnText:
        """Inverse of `to_dict`; derived numbers are derived again."""
        kl = data["kl_divergence"]
        return cls(
            Perplexity(tuple(data["window_losses"]), data["tokens_per_window"]),
            data["ratio_to_dense"],
            kl and Divergence(tuple(kl["window_means"]), kl["median"], kl["percentile99"]),
        )


@dataclass(frozen=True)
class Record:
    """What was measured in one cell.

    Attributes:
        key: digest of everything that changes the numbers.
        cell: method and settings.
        conditions: what all cells of the run share, in words: model, texts, windows, device.
        compression_ratio: the paper's, over all target weights; 0 for the dense model.
        bits_per_weight: true bits over target weights; 16 for the dense model.
        texts: by the text's name; the first is the one that rows are compared on.
        layer_errors: relative output error on calibration inputs, by full layer name.
        unseen_errors: the same on text that calibrated nothing; empty where that was not measured.
        drift: of the hidden states behind every block, on the first windows of the main text; empty for the dense
            model.
        seconds: time of each step.
        peak_memory_bytes: largest resident set of the process until the end of the cell; None if unknown.
        versions: of slablm, torch, transformers and python.
        accuracies: task → acc, stderr, n and correct (0 or 1 per question); None if no task was asked for.
        model_bits_per_weight: true bits over all weights of the model, those outside the targets in 16 bits, of a rival
            as they are in its file; None in records of before it was counted.
    """

    key: str
    cell: Cell
    conditions: dict[str, Any]
    compression_ratio: float
    bits_per_weight: float
    texts: dict[str, OnText]
    layer_errors: dict[str, float]
    unseen_errors: dict[str, float]
    drift: tuple[Drift, ...]
    seconds: dict[str, float]
    peak_memory_bytes: int | None
    versions: dict[str, str]
    accuracies: dict[str, dict[str, Any]] | None = None
    model_bits_per_weight: float | None = None

    @property
    def main(self) -> OnText:
        """What was measured on the first text."""
        return next(iter(self.texts.values()))

    @property
    def perplexity(self) -> Perplexity:
        """On the first text."""
        return self.main.perplexity

    @property
    def ratio_to_dense(self) -> float:
        """On the first text."""
        return self.main.ratio_to_dense

    @property
    def layer_error(self) -> float | None:
        """Mean of `layer_errors`."""
        return fmean(self.layer_errors.values()) if self.layer_errors else None

    @property
    def unseen_error(self) -> float | None:
        """Mean of `unseen_errors`."""
        return fmean(self.unseen_errors.values()) if self.unseen_errors else None

    @property
    def last_drift(self) -> float | None:
        """Drift behind the last block, first tokens apart; None for the dense model."""
        return self.drift[-1].rest if self.drift else None

    @property
    def average_accuracy(self) -> float | None:
        """Unweighted mean over the tasks."""
        if not self.accuracies:
            return None
        accuracies = [float(result["acc"]) for result in self.accuracies.values()]
        return sum(accuracies) / len(accuracies)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        rival = self.cell.rival
        return {
            "key": self.key,
            "method": self.cell.method,
            "config": self.cell.config.to_dict() if self.cell.config else None,
            "seed": self.cell.config.seed if self.cell.config else None,
            "rival": rival and {"name": rival.name, "path": str(rival.path)},
            "conditions": self.conditions,
            "compression_ratio": self.compression_ratio,
            "bits_per_weight": self.bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
            "texts": {name: on_text.to_dict() for name, on_text in self.texts.items()},
            "accuracies": self.accuracies,
            "layer_errors": self.layer_errors,
            "unseen_errors": self.unseen_errors,
            "drift": [asdict(block) for block in self.drift],
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "versions": self.versions,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """Inverse of `to_dict`; derived numbers are derived again."""
        config, rival = data["config"], data["rival"]
        return cls(
            key=data["key"],
            cell=Cell(
                CompressionConfig.from_dict(config) if config else None,
                Rival(rival["name"], Path(rival["path"])) if rival else None,
            ),
            conditions=data["conditions"],
            compression_ratio=data["compression_ratio"],
            bits_per_weight=data["bits_per_weight"],
            texts={name: OnText.from_dict(on_text) for name, on_text in data["texts"].items()},
            layer_errors=data["layer_errors"],
            unseen_errors=data["unseen_errors"],
            drift=tuple(Drift(**block) for block in data["drift"]),
            seconds=data["seconds"],
            peak_memory_bytes=data["peak_memory_bytes"],
            versions=data["versions"],
            accuracies=data["accuracies"],
            model_bits_per_weight=data.get("model_bits_per_weight"),
        )


class ResultsFile:
    """The JSON lines of a comparison.

    Opening one drops a torn last line from the file.

    Args:
        path: the file; it and its folder are made when the first record is written.

    Raises:
        SlabError: a line is damaged that was once written completely, or the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(path, len(whole))
        except OSError as error:
            raise SlabError(f"{path} cannot be used for results: {error.strerror}") from error
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                data = json.loads(line)
                self._lines[data["key"]] = data
            except (ValueError, KeyError, TypeError) as error:
                raise SlabError(
                    f"{path}: line {number} is damaged: delete the line (its cell is then computed again) "
                    "or use another --out"
                ) from error

    def get(self, key: str) -> Record | None:
        """The record with this key, None if its cell is not finished."""
        data = self._lines.get(key)
        return None if data is None else Record.from_dict(data)

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk when this returns.

        Raises:
            SlabError: it cannot be written.
        """
        data = record.to_dict()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json.dumps(data, allow_nan=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SlabError(f"{self.path} cannot be written: {error.strerror}") from error
        self._lines[record.key] = data
