"""One compression from a model's files to a finished folder: streamed, journaled, and to be continued after a kill.

journal      lock OUT, refuse or continue what an earlier run has left
open_dense   the model, of which only headers are read
windows      calibration tokens; with them the fingerprint is complete
blocks       the loop in `slablm.layerwise`, one block in memory
assemble     the result, copied together from the journal, shard by shard
publish      moved to OUT; the journal goes away
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slablm import __version__, checkpoint, integrity
from slablm.api import check_model, check_packable, prepare_model, with_value_dtype
from slablm.calibration.text import calibration_windows
from slablm.card import model_card
from slablm.comparison import versions
from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.inspection import read_quantization_config
from slablm.journal import Journal, open_journal, unfinished_folder
from slablm.layerwise import LayerReport, Progress, compress_blocks
from slablm.loading import is_compressed
from slablm.memory import human_bytes
from slablm.shards import sync, sync_folder
from slablm.streaming import DenseModel, StreamedBlocks, open_dense
from slablm.targets import select_targets

if TYPE_CHECKING:
    from torch import Tensor

_PUBLISH = "publish.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class RunOptions:
    """What a run does besides the numbers.

    Attributes:
        dtype: type the model is calibrated in, as for `slablm.loading.load`.
        device: compute device.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run model code from the hub.
        overwrite: replace a model that the target holds.
        resume: continue an unfinished run.
        max_memory: bytes of RAM for the calibration activations; None for as much as they take.
        max_shard_size: bytes of tensors per file of the result.
    """

    dtype: str = "auto"
    device: str = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    resume: bool = False
    max_memory: int | None = None
    max_shard_size: int = checkpoint.MAX_SHARD_SIZE


@dataclass(frozen=True)
class RunResult:
    """What became of a run.

    Attributes:
        config: the settings, the value type filled in.
        dense_bytes: bytes of the dense model's parameters; None if there was nothing left to do.
        resumed_blocks: blocks that an earlier run had finished.
    """

    config: CompressionConfig
    dense_bytes: int | None
    resumed_blocks: int


def compress_folder(
    source: str,
    out: Path,
    config: CompressionConfig,
    options: RunOptions,
    on_layer: Progress | None = None,
    say: Say = lambda line: None,
) -> RunResult:
    """Compress a model into a folder.

    Args:
        source: as for `slablm.loading.load`.
        out: target folder.
        config: settings.
        options: everything else.
        on_layer: see `slablm.compress`.
        say: told what is going on, one line at a time.

    Raises:
        SlabError: any bad input; cheap checks come before the model is read. Nothing is changed in `out`.
    """
    check_packable(config.method)
    if is_compressed(source):
        raise SlabError(f"{source} is already compressed by slablm: start from the dense model")
    checkpoint.remove_abandoned(out)
    publishing = unfinished_folder(out) / _PUBLISH
    if not publishing.exists():  # else `out` may hold this run's own result
        if options.resume and not options.overwrite and not unfinished_folder(out).exists() and _complete(out, config):
            say(f"{out} is complete, there is nothing to go on with")
            return RunResult(config, None, 0)
        checkpoint.check_target(out, options.overwrite)
    with open_journal(out, resume=options.resume) as journal:
        return _Run(source, out, config, options, journal, say).go(on_layer)


class _Run:
    """The steps between a locked journal and a published result.

    Args:
        source: see `compress_folder`, as all that follows.
    """

    def __init__(
        self, source: str, out: Path, config: CompressionConfig, options: RunOptions, journal: Journal, say: Say
    ) -> None:
        self.source, self.out, self.options, self.journal, self.say = source, out, options, journal, say
        say(f"Reading {source}")
        self.dense = _open(source, config, options)
        check_model(self.dense.model)
        self.targets = select_targets(self.dense.model, config)
        for name, reason in self.targets.left_dense.items():
            say(f"left dense: {name} ({reason})")
        say(f"Calibrating on {config.calibration}: {config.num_samples} windows of {config.seq_len} tokens")
        self.windows = calibration_windows(self.dense.model, self.dense.tokenizer, config)
        journal.accept(_fingerprint(source, self.dense, self.windows, config, options))
        self._say_what_it_takes()
        if self.dense.weights:  # checked and rounded block by block
            self.config = with_value_dtype(config, self.dense.model)
        else:
            self.config = prepare_model(self.dense.model, self.targets, config)

    def go(self, on_layer: Progress | None) -> RunResult:
        """Compress what is not done yet, put the result together, publish it."""
        model, journal = self.dense.model, self.journal
        dense_bytes, resumed = sum(parameter.nbytes for parameter in model.parameters()), journal.done
        blocks = StreamedBlocks(self.dense, self.targets, self.config, journal, self.options.max_memory)
        reports = compress_blocks(model, self.targets, self.windows, self.config, on_layer, blocks)
        if not (journal.folder / _PUBLISH).exists():
            self._assemble(reports, blocks.names)
        self._publish()
        journal.remove()
        return RunResult(self.config, dense_bytes, resumed)

    def _say_what_it_takes(self) -> None:
        if self.dense.whole_because:
            self.say(f"The whole model is in memory: {self.dense.whole_because}")
        model, limit = self.dense.model, self.options.max_memory
        needed = self.windows.numel() * model.config.get_text_config().hidden_size * model.dtype.itemsize
        file = f", all but {human_bytes(limit)} in a file" if limit is not None and needed > limit else ""
        self.say(f"Memory for hidden states of all windows: {human_bytes(needed)}{file}")
        if self.journal.done:
            self.say(f"Going on after {self.journal.done} finished blocks")

    def _assemble(self, reports: list[LayerReport], names: list[list[str]]) -> None:
        """Put the result together in the journal's folder, and make sure that it has reached the disk."""
        from slablm import hf

        model, folder = self.dense.model, self.journal.model_folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        hf.describe(model, self.config, reports)
        pieces, digests = self.journal.everything()
        digests |= {alias: digests[first] for first, *aliases in names for alias in aliases}
        checkpoint.assemble(model, folder, pieces, integrity.record(digests, names), self.options.max_shard_size)
        self.dense.tokenizer.save_pretrained(folder)
        card = model_card(self.source, self.config, reports, self.targets.left_dense, __version__)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for path in folder.iterdir():
            with path.open("rb+") as file:
                sync(file)
        sync_folder(folder)

    def _publish(self) -> None:
        """Move the result to its place; after a kill in between, go on with that."""
        note, folder = self.journal.folder / _PUBLISH, self.journal.model_folder
        present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        names = json.loads(note.read_text(encoding="utf-8")) if note.exists() else present
        if present == names:  # nothing has moved yet, and `out` may have been filled in the meantime
            checkpoint.check_target(self.out, self.options.overwrite)
        if not note.exists():
            self.journal.write_json(_PUBLISH, names)
        checkpoint.publish(folder, self.out, names)
        sync_folder(self.out)
        sync_folder(self.out.parent)


def _open(source: str, config: CompressionConfig, options: RunOptions) -> DenseModel:
    return open_dense(
        source,
        dtype=options.dtype,
        device=options.device,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        whole_because="it writes its own calibration text" if config.calibration == "self" else "",
    )


def _complete(out: Path, config: CompressionConfig) -> bool:
    """Whether `out` holds a result with these settings: the run to be continued had come to its end."""
    if not is_compressed(str(out)):
        return False
    settings = read_quantization_config(out)["compression"]
    wanted = config.to_dict()
    return all(settings.get(key) == value for key, value in wanted.items() if value is not None)


def _fingerprint(
    source: str, dense: DenseModel, windows: Tensor, config: CompressionConfig, options: RunOptions
) -> dict[str, str]:
    """Everything the bytes of the result depend on, by the name an error should use."""
    shown: dict[str, Any] = {"model": source, "device": options.device, "dtype": dense.model.dtype}
    for file in dense.files:
        status = file.stat()
        shown[f"file {file.name}"] = f"{status.st_size} bytes of {status.st_mtime_ns} ns, header {_header_digest(file)}"
    shown["model config"] = _text_digest(dense.model.config.to_json_string())
    shown |= {f"setting {key}": value for key, value in config.to_dict().items()}
    shown["calibration tokens"] = integrity.digest(windows)
    shown |= {f"version of {name}": version for name, version in versions().items()}
    # Sums are split over threads and vector lanes; other splits round differently.
    shown |= {"number of threads": torch.get_num_threads(), "CPU capability": torch.backends.cpu.get_cpu_capability()}
    return {name: str(value) for name, value in shown.items()}


def _header_digest(file: Path) -> str:
    """Digest of a file's first megabyte at most: headers are in front."""
    with file.open("rb") as opened:
        return hashlib.blake2b(opened.read(1 << 20), digest_size=8).hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
