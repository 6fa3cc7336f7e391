"""What one would pick: the dense model, two 4-bit quantizers, the paper's SLaB and `slab+`, beside each other.

    OUT/dense             the model in bfloat16, from which all start
    OUT/calibration.txt   text that the model has written, or a piece of another one: all are calibrated on it
    OUT/slab, OUT/slab+   two of the choices, as `slablm compress` writes them
    OUT/demo.png          true bits and perplexity, if matplotlib is installed

RTN and GPTQ are yardsticks: slablm stores neither, so of these the bytes are counted (codes, scales and all else in 16
bits), and they run as dense weights. Of the others everything is measured: files, speed, and the memory of a process of
its own.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slablm.calibration.text import load_text
from slablm.calibration.windows import EvaluationText, calibration_windows, windows_wanted
from slablm.checkpoint.inspection import inspect_folder
from slablm.checkpoint.layer_report import size_summary
from slablm.comparison import plots
from slablm.comparison.cells import Cell
from slablm.comparison.records import OnText, Record
from slablm.compression import run
from slablm.compression.blocks import compress_blocks
from slablm.compression.options import RunOptions
from slablm.compression.preparation import prepare_model
from slablm.config import CompressionConfig
from slablm.dense import loading
from slablm.dense.off_grid import off_the_grid
from slablm.dense.targets import select_targets
from slablm.errors import SlabError
from slablm.evaluation import Perplexity, perplexity
from slablm.evaluation.contender import Contender
from slablm.evaluation.speed import Workload, measure_speed
from slablm.methods import get_method
from slablm.methods.budget import PAPER_VALUE_BITS
from slablm.planning.checks import preflight
from slablm.system.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DENSE = "dense"
# Name → settings besides those of calibration.
COMPRESSED: dict[str, dict[str, Any]] = {
    "rtn": {"value_bits": 4, "group_size": 128},
    "gptq": {"value_bits": 4, "group_size": 128},
    "slab": {"ratio": 0.5},
    "slab+": {"bits_per_weight": 4.0},
}
EVALUATION_TOKENS = 512
WORKLOAD = Workload(prompt_tokens=128, new_tokens=32)
ROUNDS = 3
# Text is cut anew after it was written down, so that a window more or less can come of it.
SPARE_WINDOWS = 2
PICTURE = "demo.png"

Step = Callable[[str, int, int], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """One way to have the model.

    Attributes:
        name: ``dense`` or the method.
        bits_per_weight: true bits per compressed weight.
        file_bytes: weights on disk; of what is not stored, counted.
        quality: on the evaluation text.
        memory_bytes: what a process takes for it, a prompt read; None if unknown, or not run in a form of its own.
        tokens_per_second: decoding, on all cores; None if not run in a form of its own.
        folder: where it lies; None if it is not stored.
    """

    name: str
    bits_per_weight: float
    file_bytes: int
    quality: Perplexity
    memory_bytes: int | None = None
    tokens_per_second: float | None = None
    folder: Path | None = None


def measure_choices(
    source: str, out: Path, config: CompressionConfig, text: EvaluationText, say: Say, step: Step
) -> list[Choice]:
    """Make and measure all choices; the dense model comes first.

    Args:
        source: as for `slablm.dense.loading.load`.
        out: folder for all of it.
        config: `calibration`, `num_samples`, `seq_len` and `seed`.
        text: to evaluate on.
        say: told what is going on, one line at a time.
        step: called within each task with (what, steps done, steps in all).

    Raises:
        SlabError: the model cannot be loaded or compressed, or there is too little text.
    """
    folder = out / DENSE
    config = _write_dense(source, out, config, say, step)
    model, tokenizer = loading.load(str(folder), dtype="float32")
    seq_len = min(EVALUATION_TOKENS, getattr(model.config, "max_position_embeddings", None) or EVALUATION_TOKENS)
    windows = text.cut(tokenizer, seq_len).ids
    dense_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    quality = _evaluate(DENSE, model, windows, step)
    choices = [Choice(DENSE, float(PAPER_VALUE_BITS), dense_bytes, quality, folder=folder)]
    del model
    for name in COMPRESSED:
        own = _settings(config, name)
        gc.collect()  # models hold reference cycles
        if get_method(name).packable:
            choices.append(_stored(own, out, windows, step))
        else:
            choices.append(_yardstick(own, folder, dense_bytes, windows, step))
    gc.collect()
    return _run(choices, step)


def draw(choices: list[Choice], config: CompressionConfig, out: Path) -> Path | None:
    """Draw true bits and perplexity; None where matplotlib is missing."""
    try:
        plots.require_matplotlib()
    except SlabError:
        return None
    plots.save(plots.perplexity_plot([_record(choice, choices[0], config) for choice in choices]), out, "demo")
    return out / PICTURE


def _write_dense(source: str, out: Path, config: CompressionConfig, say: Say, step: Step) -> CompressionConfig:
    """Write OUT/dense and OUT/calibration.txt; the settings with that text.

    Weights out of a quantised file are moved off its grid first, or a quantizer might find it again.
    """
    loading.check_dense(source)
    model, tokenizer = loading.load(source, dtype="float32")
    if formats := loading.quantized_as(source):
        try:
            off_the_grid(model, config.seed)
            say(f"The weights come from a {formats} file: moved off its grid by rescalings that cancel")
        except SlabError as error:
            say(f"The weights come from a {formats} file and lie on its grid, which flatters RTN and GPTQ ({error})")
    out.mkdir(parents=True, exist_ok=True)
    written = out / "calibration.txt"
    written.write_text(_calibration_text(model, tokenizer, config, step), encoding="utf-8")
    shutil.rmtree(out / DENSE, ignore_errors=True)
    model.bfloat16().save_pretrained(out / DENSE)
    tokenizer.save_pretrained(out / DENSE)
    return replace(config, calibration=str(written))


def _calibration_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: CompressionConfig, step: Step
) -> str:
    enough = replace(config, num_samples=config.num_samples + SPARE_WINDOWS)
    if config.calibration != "self":
        return load_text(config.calibration, split="calibration", num_tokens=windows_wanted(enough) * config.seq_len)
    on_token = partial(step, "writing the calibration text")
    ids = calibration_windows(model, tokenizer, enough, on_token)
    return "\n\n".join(tokenizer.batch_decode(ids, skip_special_tokens=True))


def _stored(config: CompressionConfig, out: Path, windows: Tensor, step: Step) -> Choice:
    """What `slablm compress` makes of the dense folder, loaded from where it lies."""
    folder = out / config.method
    run.compress_folder(
        str(out / DENSE), folder, config, RunOptions(dtype="float32", overwrite=True),
        lambda done, total, report: step(f"compressing ({config.method})", done, total), check=preflight,
    )  # fmt: skip
    model, _ = loading.load(str(folder))
    sizes = inspect_folder(folder)
    quality = _evaluate(config.method, model, windows, step)
    return Choice(config.method, sizes.bits_per_weight, sizes.file_bytes, quality, folder=folder)


def _yardstick(config: CompressionConfig, dense: Path, dense_bytes: int, windows: Tensor, step: Step) -> Choice:
    """A method without a format: its numbers in dense weights."""
    model, tokenizer = loading.load(str(dense), dtype="float32")
    targets = select_targets(model, config)
    config = prepare_model(model, targets, config)
    calibration = calibration_windows(model, tokenizer, config)
    reports = compress_blocks(
        model, targets, calibration, config,
        lambda done, total, report: step(f"compressing ({config.method})", done, total),
    )  # fmt: skip
    sizes = size_summary(reports)
    bits = sizes["bits_per_weight"]
    size = round(dense_bytes - sizes["weights"] * (PAPER_VALUE_BITS - bits) / 8)
    return Choice(config.method, bits, size, _evaluate(config.method, model, windows, step))


def _evaluate(name: str, model: PreTrainedModel, windows: Tensor, step: Step) -> Perplexity:
    return perplexity(model, windows, partial(step, f"evaluating ({name})"))


def _run(choices: list[Choice], step: Step) -> list[Choice]:
    """Speed and memory of what is stored, each in the form in which it lies in its folder."""
    contenders = {choice.name: Contender(choice.name, str(choice.folder)) for choice in choices if choice.folder}
    memory = {}
    for number, (name, contender) in enumerate(contenders.items(), 1):
        found = contender.footprint(WORKLOAD.prompt_tokens)
        if found.resident is not None and found.before is not None:
            memory[name] = found.resident - found.before
        step("measuring memory", number, len(contenders))
    models = {name: contender.load() for name, contender in contenders.items()}
    speeds = measure_speed(models, WORKLOAD, ROUNDS, [torch.get_num_threads()], on_run=partial(step, "measuring speed"))
    decoding = {speed.contender: speed.decode.median for speed in speeds}
    return [
        replace(choice, memory_bytes=memory.get(choice.name), tokens_per_second=decoding.get(choice.name))
        for choice in choices
    ]


def _settings(config: CompressionConfig, name: str) -> CompressionConfig:
    own = {"method": name, "ratio": None, "bits_per_weight": None} | COMPRESSED[name]
    return replace(config, **own)


def _record(choice: Choice, dense: Choice, config: CompressionConfig) -> Record:
    """A choice as the plots of a comparison take it."""
    cell = Cell(_settings(config, choice.name) if choice.name in COMPRESSED else None)
    on_text = OnText(choice.quality, choice.quality.value / dense.quality.value)
    return Record("", cell, {}, 0.0, choice.bits_per_weight, {"": on_text}, {}, {}, (), {}, None, versions())
