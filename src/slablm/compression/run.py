"""One compression from a model's files to a finished folder: streamed, journaled, and to be continued after a kill.

journal      lock OUT, refuse or continue what an earlier run has left
open_dense   the model, of which only headers are read
windows      calibration tokens; with them the fingerprint is complete
blocks       the loop in `slablm.compression.blocks`, one block in memory
assemble     the result, copied together from the journal, shard by shard
publish      moved to OUT; the journal goes away

With several ranks, all of them take part in the blocks. The rest is done by rank 0, which tells the others where to
begin and with what; they check that they would have begun with the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from slablm.calibration.stream import windows_held
from slablm.calibration.windows import calibration_windows
from slablm.checkpoint import integrity
from slablm.checkpoint.card import model_card
from slablm.checkpoint.inspection import read_quantization_config
from slablm.checkpoint.layer_report import LayerReport, few_tokens_line, rarely_chosen
from slablm.checkpoint.save import assemble, check_target, publish
from slablm.checkpoint.shards import sync, sync_folder
from slablm.checkpoint.staging import remove_abandoned
from slablm.checkpoint.verification import open_folder
from slablm.compression.blocks import Progress, compress_blocks, unreached
from slablm.compression.fingerprint import differences, fingerprint, inputs, read_run, write_run
from slablm.compression.journal import Journal, open_journal, unfinished_folder
from slablm.compression.options import RunOptions
from slablm.compression.preparation import (
    check_model,
    check_packable,
    check_ranks,
    prepare_model,
    use_head_bits,
    with_value_dtype,
)
from slablm.compression.streaming import StreamedBlocks
from slablm.config import CompressionConfig
from slablm.dense.loading import check_dense, is_compressed
from slablm.dense.opening import DenseModel, open_dense
from slablm.dense.targets import Targets, select_targets
from slablm.errors import SlabError
from slablm.methods.drift import Drift
from slablm.system.memory import give_back, human_bytes
from slablm.system.waiting import Tenths

_PUBLISH = "publish.json"
Say = Callable[[str], None]
# Refuses a run that cannot end well, before anything is calibrated: model, settings, options, target folder, and bytes
# that an unfinished run holds already. `slablm.planning` stands below this room, so its check is handed in.
Check = Callable[[DenseModel, CompressionConfig, RunOptions, Path, int], None]


@dataclass(frozen=True)
class RunResult:
    """What became of a run.

    Attributes:
        config: the settings, the value type filled in.
        dense_bytes: bytes of the dense model's parameters; None if there was nothing left to do.
        resumed_blocks: blocks that an earlier run had finished.
        rarely_chosen: experts that hardly any calibration token was sent to, and how many were.
    """

    config: CompressionConfig
    dense_bytes: int | None
    resumed_blocks: int
    rarely_chosen: dict[str, int] = field(default_factory=dict)


def compress_folder(
    source: str,
    out: Path,
    config: CompressionConfig,
    options: RunOptions,
    on_layer: Progress | None = None,
    say: Say = lambda line: None,
    check: Check = lambda dense, config, options, out, present: None,
) -> RunResult:
    """Compress a model into a folder.

    Args:
        source: as for `slablm.dense.loading.load`.
        out: target folder.
        config: settings.
        options: everything else.
        on_layer: see `slablm.compress`.
        say: told what is going on, one line at a time.
        check: called when the model is open and nothing is computed yet.

    Raises:
        SlabError: any bad input; cheap checks come before the model is read. Nothing is changed in `out`.
    """
    check_packable(config.method)
    out = out.resolve()  # hidden folders lie beside it, whatever it is called here
    world = options.world
    check_ranks(config, world.size)
    check_dense(source)
    if not world.first:
        return _help(source, out, config, options)
    remove_abandoned(out)
    publishing = unfinished_folder(out) / _PUBLISH
    if not publishing.exists():  # else `out` may hold this run's own result
        to_continue = options.resume and not options.overwrite and not unfinished_folder(out).exists()
        if to_continue and _finished(source, out, config, options):
            say(f"{out} is complete, there is nothing to go on with")
            world.tell(None)
            return RunResult(config, None, 0)
        check_target(out, options.overwrite)
    with open_journal(out, resume=options.resume) as journal:
        run = _Run(source, out, config, options, journal, say)
        check(run.dense, config, options, out, sum(file.stat().st_size for file in journal.folder.iterdir()))
        run.calibrate()
        return run.go(on_layer)


class _Run:
    """The steps between a locked journal and a published result.

    Args:
        source: see `compress_folder`, as all that follows.
    """

    def __init__(
        self, source: str, out: Path, config: CompressionConfig, options: RunOptions, journal: Journal, say: Say
    ) -> None:
        self.source, self.out, self.config, self.options = source, out, config, options
        self.journal, self.say = journal, say
        say(f"Reading {source}")
        self.dense = _open(source, config, options)
        check_model(self.dense.model)
        self.targets = select_targets(self.dense.model, config)
        self._say_left_dense(self.targets.left_dense)

    def calibrate(self) -> None:
        """Read the calibration text; with it all is known that the result depends on."""
        config, options, journal = self.config, self.options, self.journal
        self.say(f"Calibrating on {config.calibration}: {config.num_samples} windows of {config.seq_len} tokens")
        writing = Tenths("Writing the calibration text", self.say)
        self.windows = calibration_windows(self.dense.model, self.dense.tokenizer, config, writing)
        give_back()  # what reading the model and the text has left in the heap
        self.made_from = inputs(self.dense, config)
        found = fingerprint(self.made_from, self.windows, config, options)
        journal.accept(found)
        options.world.tell((self.windows, found, journal.done))
        self._say_what_it_takes()
        self.dense_bytes = sum(parameter.nbytes for parameter in self.dense.model.parameters())
        self.config = _prepared(self.dense, self.targets, config)

    def go(self, on_layer: Progress | None) -> RunResult:
        """Compress what is not done yet, put the result together, publish it."""
        model, journal = self.dense.model, self.journal
        resumed = journal.done
        limit, world = self.options.max_memory, self.options.world
        blocks = StreamedBlocks(
            self.dense, self.targets, self.config, journal,
            max_activation_bytes=limit, folder=journal.folder, done=resumed,
        )  # fmt: skip
        reports = compress_blocks(model, self.targets, self.windows, self.config, on_layer, blocks, world)
        left_dense = unreached(self.targets, reports)
        self._say_left_dense(left_dense)
        if rare := rarely_chosen(reports):
            self.say(few_tokens_line(rare))
        if not (journal.folder / _PUBLISH).exists():
            self._assemble(reports, blocks.drift, self.targets.left_dense | left_dense, blocks.names)
        self._publish()
        journal.remove()
        world.tell(None)
        return RunResult(self.config, self.dense_bytes, resumed, rare)

    def _say_left_dense(self, reasons: dict[str, str]) -> None:
        for name, reason in reasons.items():
            self.say(f"left dense: {name} ({reason})")

    def _say_what_it_takes(self) -> None:
        if self.dense.whole_because:
            self.say(f"The whole model is in memory: {self.dense.whole_because}")
        model, limit, ranks = self.dense.model, self.options.max_memory, self.options.world.size
        if model.dtype == torch.float16 and self.options.compute_device == "cpu":
            self.say("Calibrating in float16, which CPUs are slow at: --dtype float32 is faster and takes more memory")
        count, seq_len = self.windows.shape
        calibrating = self.config.num_samples
        most = max(windows_held(calibrating, count - calibrating, ranks)) * seq_len  # tokens of the busiest rank
        needed = most * model.config.get_text_config().hidden_size * model.dtype.itemsize
        file = f", all but {human_bytes(limit)} in a file" if limit is not None and needed > limit else ""
        whose = "all windows" if ranks == 1 else f"the windows of each of {ranks} ranks"
        self.say(f"Memory for hidden states of {whose}: {human_bytes(needed)}{file}")
        if self.journal.done:
            self.say(f"Going on after {self.journal.done} finished blocks")

    def _assemble(
        self, reports: list[LayerReport], drift: list[Drift], left_dense: dict[str, str], names: list[list[str]]
    ) -> None:
        """Put the result together in the journal's folder, and make sure that it has reached the disk."""
        from slablm.checkpoint import hf

        model, folder = self.dense.model, self.journal.model_folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        version = hf.describe(model, self.config, reports, drift).description.written_version
        pieces, digests = self.journal.everything()
        digests |= {alias: digests[first] for first, *aliases in names for alias in aliases}
        assemble(model, folder, pieces, integrity.record(digests, names, version), self.options.max_shard_size)
        self.dense.tokenizer.save_pretrained(folder)
        revision = self.options.revision
        written = open_folder(folder)
        bits = 8 * written.file_bytes / written.model_weights
        card = model_card(self.source, self.config, reports, left_dense, revision, drift, model_bits=bits)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_run(folder, self.made_from)
        for path in (path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb+") as file:
                sync(file)
        sync_folder(folder)

    def _publish(self) -> None:
        """Move the result to its place; after a kill in between, go on with that."""
        note, folder = self.journal.folder / _PUBLISH, self.journal.model_folder
        present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        names = json.loads(note.read_text(encoding="utf-8")) if note.exists() else present
        if present == names:  # nothing has moved yet, and `out` may have been filled in the meantime
            check_target(self.out, self.options.overwrite, present)
        if not note.exists():
            self.journal.write_json(_PUBLISH, names)
        publish(folder, self.out, names)
        sync_folder(self.out)
        sync_folder(self.out.parent)


def _help(source: str, out: Path, config: CompressionConfig, options: RunOptions) -> RunResult:
    """What a rank other than 0 does: open the model, be told where to begin, and walk through the blocks.

    Raises:
        SlabError: this rank would have begun with something else than rank 0; or as for `compress_folder`.
    """
    world = options.world
    dense = _open(source, config, options)
    check_model(dense.model)
    targets = select_targets(dense.model, config)
    told = world.tell(None)
    if told is None:  # there is nothing left to do
        return RunResult(config, None, 0)
    windows, theirs, done = told
    _check_alike(theirs, fingerprint(inputs(dense, config), windows, config, options))
    config = _prepared(dense, targets, config)
    blocks = StreamedBlocks(
        dense, targets, config, None, max_activation_bytes=options.max_memory,
        folder=out.parent if out.parent.is_dir() else None, done=done,
    )  # fmt: skip
    try:
        compress_blocks(dense.model, targets, windows, config, None, blocks, world)
        world.tell(None)  # rank 0 has published the result
    except SlabError as error:
        kept = "finished blocks are kept, run the same command with --resume to go on"
        raise type(error)(f"{error}; {kept}") from error
    return RunResult(config, None, done)


def _check_alike(first: dict[str, str], mine: dict[str, str]) -> None:
    """Refuse a rank that would get other numbers than rank 0, from what their fingerprints say."""
    for name, value in mine.items():
        if value != first.get(name):
            raise SlabError(
                f"another {name} than on rank 0 (there {first.get(name)}, here {value}): "
                "all ranks need the same command, model, versions, number of threads and kind of CPU"
            )


def _prepared(dense: DenseModel, targets: Targets, config: CompressionConfig) -> CompressionConfig:
    """The settings with the value type filled in; a model in memory is checked and rounded."""
    if dense.weights:  # checked and rounded block by block
        use_head_bits(dense.model, config)
        return with_value_dtype(config, dense.model)
    return prepare_model(dense.model, targets, config)


def _open(source: str, config: CompressionConfig, options: RunOptions) -> DenseModel:
    return open_dense(
        source,
        dtype=options.dtype,
        device=options.compute_device,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        whole_because="it writes its own calibration text" if config.calibration == "self" else "",
    )


def _finished(source: str, out: Path, config: CompressionConfig, options: RunOptions) -> bool:
    """Whether `out` holds the very result of this run, which had come to its end; False if it holds none.

    Raises:
        SlabError: it holds the result of another run, or it is not known of which.
    """
    if not is_compressed(str(out)):
        return False
    way_out = "choose another folder or give --overwrite"
    # Results of before know nothing of a head in 8 bits.
    before = {"head_bits": CompressionConfig.head_bits} | read_quantization_config(out)["compression"]
    wanted = config.to_dict()
    settings = {name: value for name, value in wanted.items() if value is not None}
    if found := differences({name: before.get(name) for name in settings}, settings):
        raise SlabError(f"{out} already holds a model, made with another {found}: {way_out}")
    made_from = read_run(out)
    if made_from is None:
        raise SlabError(f"{out} already holds a model, and it is not known what it was made from: {way_out}")
    if found := differences(made_from, inputs(_open(source, config, options), config)):
        raise SlabError(f"{out} already holds a model, made from another {found}: {way_out}")
    return True
