"""What cannot work, found before anything is computed."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slablm.calibration.statistics import rows_per_window
from slablm.calibration.stream import windows_held
from slablm.calibration.windows import UNSEEN_WINDOWS
from slablm.compression.preparation import use_head_bits, with_value_dtype
from slablm.config import CompressionConfig
from slablm.dense.opening import empty_model
from slablm.dense.targets import Targets, select_targets
from slablm.errors import SlabError
from slablm.methods import get_method
from slablm.planning.memory import Memory, Situation, plan_memory, spilled_bytes
from slablm.planning.rehearsal import Rehearsal, rehearse
from slablm.planning.size import Size, budgets, plan_size
from slablm.system.memory import human_bytes, resident_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slablm.compression.options import RunOptions
    from slablm.dense.opening import DenseModel

# transformers writes a few small files, the model card and digests of the journal beside the tensors.
_SMALL_FILES = 100_000


@dataclass(frozen=True)
class Disk:
    """Disk space.

    Attributes:
        result_bytes: what OUT will hold.
        journal_bytes: finished blocks, kept beside OUT until it is complete.
        spilled_bytes: hidden states in a file, gone before the result is put together.
        free_bytes: what is free there now.
    """

    result_bytes: int
    journal_bytes: int
    spilled_bytes: int
    free_bytes: int

    @property
    def needed_bytes(self) -> int:
        """The most that is needed at a time."""
        return self.journal_bytes + max(self.result_bytes, self.spilled_bytes)


@dataclass(frozen=True)
class Known:
    """What shapes and settings do not tell.

    Attributes:
        whole: whether the model is in memory as a whole.
        file_bytes: bytes of the model's files.
        stored_itemsize: bytes of a weight in them.
        base_bytes: memory of the process without the model.
        other_bytes: files of the result besides weights and config: tokenizer and so on.
        present_bytes: what an unfinished run has put on the disk already.
    """

    whole: bool
    file_bytes: int
    stored_itemsize: int
    base_bytes: int
    other_bytes: int = 0
    present_bytes: int = 0


@dataclass(frozen=True)
class Outlook:
    """Everything but the time.

    Attributes:
        rehearsal: what calibration takes.
        size: what is stored.
        memory: peak memory.
        disk: disk space.
    """

    rehearsal: Rehearsal
    size: Size
    memory: Memory
    disk: Disk

    def problems(self, device: torch.device, present_bytes: int) -> list[str]:
        """What makes the run impossible on this machine, one line each."""
        found = []
        if self.disk.needed_bytes > self.disk.free_bytes + present_bytes:
            found.append(
                f"the disk has {human_bytes(self.disk.free_bytes)} free where OUT is to be, "
                f"{human_bytes(self.disk.needed_bytes)} are needed: free some, or choose another folder"
            )
        total, peak = machine_memory(), self.memory.peak_bytes
        if total is not None and peak > total:
            found.append(f"{_too_much(peak, total, 'this machine')} ({self.memory.largest.name})")
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            peak = self.memory.device_phase.total(on_device=True)
            if peak > total:
                found.append(f"{_too_much(peak, total, str(device))} ({self.memory.device_phase.name})")
        return found


def look_ahead(
    model: PreTrainedModel,
    targets: Targets,
    config: CompressionConfig,
    options: RunOptions,
    out: Path,
    known: Known,
) -> tuple[Outlook | None, list[str]]:
    """Size, memory and disk, and what is impossible; no outlook where the settings do not fit the shapes.

    Args:
        model: on the meta device; changed.
        targets: layers to compress.
        config: the settings, `value_dtype` included.
        options: as for a run.
        out: the target folder.
        known: what shapes and settings do not tell.
    """
    stored_as, problems = budgets(model, targets, config)
    if not options.mostly_dense:
        try:
            targets.check_reach()
        except SlabError as error:
            problems.insert(0, str(error))
    largest_outside, dense_bytes = _largest_outside(model, targets), sum(p.nbytes for p in model.parameters())
    try:
        use_head_bits(model, config)
    except SlabError as error:
        problems.append(str(error))
    if problems:
        return None, problems
    device = torch.device(options.device)
    ranks = options.world.size
    method = get_method(config.method)
    grams = method.needs_gram + method.needs_held_out
    rehearsal = rehearse(model, targets, config.seq_len, _samples(config), device, grams=grams)
    situation = Situation(
        itemsize=model.dtype.itemsize,
        stored_itemsize=known.stored_itemsize,
        float32=model.dtype == torch.float32,
        largest_outside=largest_outside,
        whole=known.whole,
        file_bytes=known.file_bytes,
        accelerator=device.type != "cpu",
        max_memory=options.max_memory,
        ranks=ranks,
    )
    size = plan_size(model, stored_as, config, options.max_shard_size, dense_bytes)
    memory = plan_memory(rehearsal, size, config, situation, known.base_bytes)
    disk = Disk(
        result_bytes=size.file_bytes + size.config_bytes + known.other_bytes,
        journal_bytes=size.file_bytes + _SMALL_FILES,
        spilled_bytes=sum(
            spilled_bytes(rehearsal.window_bytes, windows, options.max_memory)
            for windows in windows_held(config.num_samples, UNSEEN_WINDOWS, ranks)
        ),
        free_bytes=free_bytes(out),
    )
    outlook = Outlook(rehearsal, size, memory, disk)
    return outlook, outlook.problems(device, known.present_bytes)


def preflight(dense: DenseModel, config: CompressionConfig, options: RunOptions, out: Path, present: int) -> None:
    """Refuse a run that cannot end well.

    Args:
        dense: the model; its weights are not looked at.
        config: the settings.
        options: of the run.
        out: the target folder.
        present: bytes that an unfinished run holds already.

    Raises:
        SlabError: the first thing that is impossible.
    """
    # A copy, as the settings will be written into it.
    model = empty_model(
        copy.deepcopy(dense.model.config), dense.model.dtype, trust_remote_code=options.trust_remote_code
    )
    resident = resident_bytes() or 0
    dense_bytes = sum(p.nbytes for p in model.parameters()) if dense.whole_because else 0
    itemsize = max((p.meta().dtype.itemsize for p in dense.weights.values()), default=model.dtype.itemsize)
    _, problems = look_ahead(
        model,
        select_targets(model, config),
        with_value_dtype(config, model),
        replace(options, device=str(dense.device)),  # among ranks it is the rank's own
        out,
        Known(
            whole=bool(dense.whole_because),
            file_bytes=sum(f.stat().st_size for f in dense.files),
            stored_itemsize=itemsize,
            base_bytes=max(0, resident - dense_bytes),
            present_bytes=present,
        ),
    )
    if problems:
        raise SlabError(problems[0])


def free_bytes(out: Path) -> int:
    """Free disk space where a folder is to be."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def machine_memory() -> int | None:
    """Bytes of RAM this process may use: the machine's, or its control group's if that is less."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdigit() else total


def _samples(config: CompressionConfig) -> tuple[int, int]:
    """Rows that a layer's collector keeps of the windows that calibrate, and of those that do not."""
    calibrating, unseen = config.num_samples, UNSEEN_WINDOWS
    return calibrating * rows_per_window(calibrating), unseen * rows_per_window(unseen)


def _largest_outside(model: PreTrainedModel, targets: Targets) -> int:
    compressed = {f"{name}.weight" for names in targets.names for name in names}
    return max(p.numel() for name, p in model.named_parameters() if name not in compressed)


def _too_much(peak: int, total: int, where: str) -> str:
    return (
        f"about {human_bytes(peak)} of memory are needed, {where} has {human_bytes(total)}: "
        "use --max-memory, fewer --num-samples, a shorter --seq-len or a smaller --dtype"
    )
