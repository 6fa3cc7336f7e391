"""What each part of a method gives, and the time it takes: the parts added one after the other.

`--of slab+`: the first arm is the paper's algorithm with as many bits as it takes; the others have a budget in true
bits; the first of those has no trellis, and as plain torch takes its place, its time says nothing. `--of gptq`: why its
plain form loses to rounding, and what of its better form makes up for that. Seconds are of the compression, calibration
included, one thread or as many as OMP_NUM_THREADS says; their ratio to the first arm is printed beside them. The arms
run one after the other in one process.

A method that fits the calibration tokens can miss all others. So the mean error of the layers is printed twice: on the
calibration windows, and on two windows of the same text that calibrate nothing.

    python benchmarks/options.py MODEL --of gptq --calibration c4-sample.txt@0-227 --num-samples 40 --seq-len 1024 \
        --text wikitext2-test.txt@0-5 --text c4-sample.txt@130-133
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from torch import Tensor

from slablm.calibration import stream
from slablm.calibration.statistics import StatsCollector
from slablm.calibration.windows import EvaluationText, calibration_windows
from slablm.checkpoint.layer_report import error_summary, size_summary
from slablm.compression.blocks import compress_blocks
from slablm.compression.preparation import prepare_model
from slablm.config import CompressionConfig
from slablm.dense import loading
from slablm.dense.targets import select_targets
from slablm.evaluation.perplexity import perplexity
from slablm.methods import quantizers, slab_plus, symbols, symbols_fit, trellis
from slablm.methods import sweep as sweep_module
from slablm.methods.uniform import spanning_grids
from slablm.runtime.replace_module import unpack_layers

SEQ_LEN = 2048
BITS = 3.7


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


def slab_plus_arms() -> list[Arm]:
    """From the paper's algorithm to all of `slab+`, at `BITS` true bits per weight."""
    budget = {"method": "slab+", "bits_per_weight": BITS}
    even = (stream, "sensitivities", lambda *args: {})
    plain = (slab_plus.Trial, "descended", slab_plus.Trial.plain)
    no_descent = (slab_plus, "DESCENTS", 0)
    no_rotation = (slab_plus, "largest_block", lambda size: 1)
    return [
        Arm("slab 50 %, 16-bit values", {"method": "slab"}),
        Arm("symbols of one sign, nearest values", budget, [even, no_rotation, plain, *one_state()]),
        Arm("+ signs from the row above (trellis)", budget, [even, no_rotation, plain]),
        Arm("+ error feedback and refit", budget, [even, no_rotation, no_descent]),
        Arm("+ descent", budget, [even, no_rotation]),
        Arm("+ rotation where it helps", budget, [even]),
        Arm("+ measured sensitivities (slab+)", budget),
    ]


def one_state() -> list[tuple[Any, str, Any]]:
    """No trellis: τ is always +1, and every entry gets the nearest of 2^p levels.

    Only where `signs` is patched so are the symbols read as they were written.
    """

    def nearest(targets: Tensor, scales: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        relative = targets / scales.clamp_min(torch.finfo(torch.float32).tiny)
        index = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2)
        return index.to(torch.uint8), scales * levels[index]

    return [
        (symbols_fit, "ROUNDS", 50),  # they begin with levels for a trellis, too wide here
        (symbols, "signs", torch.ones_like),
        (symbols_fit, "signs", torch.ones_like),
        (symbols_fit, "nearest_codes", nearest),
        (trellis, "nearest_codes", nearest),
        (symbols_fit, "trellis_columns", trellis.plain_trellis_columns),
        (slab_plus, "trellis_columns", trellis.plain_trellis_columns),
    ]


def gptq_arms(num_samples: int, seq_len: int) -> list[Arm]:
    """From rounding to GPTQ at its best, 4 bits in groups of 128; and what the calibration text has to do with it."""
    plain, best = {"method": "gptq-plain"}, {"method": "gptq"}

    def damped(share: float) -> tuple[Any, str, Any]:
        return quantizers, "DAMPINGS", (share,)

    # Neither order nor grids: min/max grids that are fixed before, columns in their own order.
    spanning = (quantizers, "weighted_grids", lambda w, d, c: spanning_grids(w, c.value_bits, c.group_size))
    factored = partial(sweep_module.factored, damping=0.1)
    shorter = {"num_samples": 4 * num_samples, "seq_len": seq_len // 4}
    longer = {"num_samples": num_samples // 2, "seq_len": 2 * seq_len}
    return [
        Arm("rounding, plain", {"method": "rtn-plain"}),
        Arm("rounding, clipped", {"method": "rtn"}),
        Arm("GPTQ, plain (1 % damping)", plain),
        Arm("GPTQ, plain, 10 % damping", plain, [(quantizers, "factored", factored)]),
        Arm("GPTQ, plain, windows a quarter as long", plain | shorter),
        Arm("GPTQ, plain, windows twice as long", plain | longer),
        Arm("GPTQ, plain, without the first token", plain, [without_first_token()]),
        Arm("GPTQ, order, 1 % damping", best, [spanning, damped(0.01)]),
        Arm("GPTQ, order, 10 % damping", best, [spanning, damped(0.1)]),
        Arm("GPTQ, order, clips, 10 % damping", best, [damped(0.1)]),
        Arm("GPTQ, order, clips, damping chosen (gptq)", best),
        Arm("the same without the first token", best, [without_first_token()]),
    ]


def without_first_token() -> tuple[Any, str, Any]:
    """Statistics that leave out the first token of every window."""
    add = StatsCollector.add

    def add_the_others(self: StatsCollector, inputs: Tensor, *args: Any) -> None:
        add(self, inputs[..., 1:, :], *args)

    return StatsCollector, "add", add_the_others


def main(
    source: str,
    calibration: Annotated[str, typer.Option(help="Perhaps with a range of windows, as TEXT@0-113.")],
    text: Annotated[list[str], typer.Option(help="As TEXT@0-3; repeat for several.")],
    of: Annotated[str, typer.Option(help="slab+ or gptq.")] = "slab+",
    num_samples: int = 8,
    seq_len: int = SEQ_LEN,
    only: Annotated[list[int] | None, typer.Option(help="Numbers of arms, from 0.")] = None,
) -> None:
    """Print one JSON line per arm."""
    base = {"calibration": calibration, "num_samples": num_samples, "seq_len": seq_len}
    first = None
    arms = slab_plus_arms() if of == "slab+" else gptq_arms(num_samples, seq_len)
    for number, arm in enumerate(arms):
        if only and number not in only:
            continue
        result = measure(source, arm, base, text)
        first = result["seconds"] if number == 0 else first
        ratio = None if first is None else round(result["seconds"] / first, 2)
        print(json.dumps({"arm": arm.name, **result, "ratio": ratio}), flush=True)


def measure(source: str, arm: Arm, base: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Compress and evaluate."""
    model, tokenizer = loading.load(source)
    config = CompressionConfig(**base | arm.settings)
    targets = select_targets(model, config)
    config = prepare_model(model, targets, config)
    calibrating = calibration_windows(model, tokenizer, config)
    start = time.perf_counter()
    with ExitStack() as stack:
        for module, attribute, value in arm.patches:
            stack.enter_context(patch.object(module, attribute, value))
        reports = compress_blocks(model, targets, calibrating, config)
        seconds = time.perf_counter() - start
        unpack_layers(model, torch.float32)
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
