"""What each part of `slab+` gives, and the time it takes: the parts added one after the other.

The first arm is the paper's algorithm with as many bits as it takes; the others have a budget in true bits. Seconds are
of the compression, calibration included, one thread or as many as OMP_NUM_THREADS says; their ratio to the paper's
algorithm is printed beside them. The arms run one after the other in one process.

A method that fits the calibration tokens can miss all others. So the mean error of the layers is printed twice: on the
calibration windows, and on two windows of the same text that calibrate nothing. Quantizers stand at the end.

    python benchmarks/options.py smollm2 --calibration c4-sample.txt --text wikitext2-test.txt
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer

from slablm.calibration import stream
from slablm.calibration.windows import EvaluationText, calibration_windows
from slablm.checkpoint.layer_report import error_summary, size_summary
from slablm.compression.blocks import compress_blocks
from slablm.compression.preparation import prepare_model
from slablm.config import CompressionConfig
from slablm.dense import loading
from slablm.dense.targets import select_targets
from slablm.evaluation.perplexity import perplexity
from slablm.methods import get_method, slab_plus
from slablm.runtime.linear import SlabLinear
from slablm.runtime.replace_module import replace_module

SEQ_LEN = 2048


@dataclass(frozen=True)
class Arm:
    """One variant.

    Attributes:
        name: what it adds to the one before.
        settings: differences of the settings.
        patches: (module, attribute, value) to take parts away.
    """

    name: str
    settings: dict[str, Any]
    patches: list[tuple[Any, str, Any]] = field(default_factory=list)


def arms(bits: float) -> list[Arm]:
    """From the paper's algorithm to all of `slab+`, at `bits` true bits per weight."""
    budget = {"method": "slab+", "bits_per_weight": bits}
    even = (stream, "sensitivities", lambda *args: {})
    no_feedback = (stream, "get_method", lambda name: replace(get_method(name), needs_held_out=False))
    no_descent = (slab_plus, "DESCENTS", 0)
    return [
        Arm("slab 50 %, 16-bit values", {"method": "slab"}),
        Arm("slab+ 50 %, 16-bit values, weighted factors alone", {"method": "slab+"}, [no_feedback]),
        Arm("slab+ 50 %, 16-bit values, no descent", {"method": "slab+"}, [no_descent]),
        Arm("slab+ 50 %, 16-bit values", {"method": "slab+"}),
        # Without feedback there are no trials either: the bits that these have chosen for most layers.
        Arm("weighted factors and grid", {**budget, "magnitude_bits": 3}, [even, no_feedback]),
        Arm("+ error feedback and refit", budget, [even, no_descent]),
        Arm("+ descent", budget, [even]),
        Arm("+ uneven budgets (slab+)", budget),
        Arm("+ refinement (--refine)", budget | {"refine": True}),
        Arm("rounding, 4 bit, group 128", {"method": "rtn", "value_bits": 4, "group_size": 128}),
        Arm("GPTQ, 4 bit, group 128", {"method": "gptq", "value_bits": 4, "group_size": 128}),
    ]


def main(
    source: str,
    calibration: Annotated[str, typer.Option(help="Perhaps with a range of windows, as TEXT@0-113.")],
    text: Annotated[list[str], typer.Option(help="As TEXT@0-3; repeat for several.")],
    bits: float = 3.5,
    num_samples: int = 8,
    only: Annotated[list[int] | None, typer.Option(help="Numbers of arms, from 0.")] = None,
) -> None:
    """Print one JSON line per arm."""
    base = CompressionConfig(calibration=calibration, num_samples=num_samples, seq_len=SEQ_LEN)
    paper = None
    for number, arm in enumerate(arms(bits)):
        if only and number not in only:
            continue
        result = measure(source, arm, base, text)
        paper = result["seconds"] if number == 0 else paper
        ratio = None if paper is None else round(result["seconds"] / paper, 2)
        print(json.dumps({"arm": arm.name, **result, "ratio": ratio}), flush=True)


def measure(source: str, arm: Arm, base: CompressionConfig, texts: list[str]) -> dict[str, Any]:
    """Compress and evaluate."""
    model, tokenizer = loading.load(source)
    config = CompressionConfig(**{**base.to_dict(), **arm.settings})
    targets = select_targets(model, config)
    config = prepare_model(model, targets, config)
    calibrating = calibration_windows(model, tokenizer, config)
    start = time.perf_counter()
    with ExitStack() as stack:
        for module, attribute, value in arm.patches:
            stack.enter_context(patch.object(module, attribute, value))
        reports = compress_blocks(model, targets, calibrating, config)
    seconds = time.perf_counter() - start
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SlabLinear):
            replace_module(model, name, layer.unpacked(torch.float32))
    windows = {text: EvaluationText.read(text, SEQ_LEN).cut(tokenizer, SEQ_LEN).ids for text in texts}
    errors = error_summary(reports)
    return {
        "bits_per_weight": round(size_summary(reports)["bits_per_weight"], 3),
        **{text: round(perplexity(model, ids).value, 3) for text, ids in windows.items()},
        **{name: None if error is None else round(error, 4) for name, error in errors.items()},
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    typer.run(main)
