"""``slablm eval``: perplexity or zero-shot accuracy of a dense or compressed model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slablm.cli import options
from slablm.cli.console import (
    Device,
    Dtype,
    Json,
    Revision,
    TrustRemoteCode,
    echo,
    next_step,
    next_try,
    print_json,
    progress,
    say_if_quantized,
)
from slablm.errors import SlabError

if TYPE_CHECKING:
    from slablm.evaluation.zeroshot import TaskResult

# Options that mean something for one of the two measurements only.
PERPLEXITY_OPTIONS = ("text", "seq_len", "max_windows")
TASK_OPTIONS = ("limit", "batch_size")


def evaluate(
    context: typer.Context,
    model: options.Model,
    text: options.EvaluationText = "wikitext2",
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    bos: options.Bos = True,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Use only the first windows.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Zero-shot tasks of lm-eval, separated by commas; slab-paper names seven.")
    ] = None,
    task_file: Annotated[
        list[Path] | None, typer.Option(help="JSON-lines file with a task's questions; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first questions of every task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers scored at a time; larger is faster on GPUs.")] = 1,
    card: Annotated[
        bool,
        typer.Option(
            "--card", help="Also write the result, and how it was measured, into the card of MODEL, a folder."
        ),
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Measure perplexity on non-overlapping windows or, with --tasks or --task-file, zero-shot accuracy instead."""
    from slablm.dense import loading
    from slablm.dense.loading import quiet_libraries

    def load() -> tuple[Any, Any]:
        quiet_libraries()
        say_if_quantized(model)
        return loading.load(model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code)

    if card and not (loading.is_compressed(model) and (Path(model) / "README.md").is_file()):
        raise SlabError(f"--card writes into the card of a folder that slablm has written: {model} is none")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is None and not task_file:
        _refuse(context, TASK_OPTIONS, "counts for zero-shot tasks: add --tasks or --task-file")
        result, how = _perplexity(load, text, seq_len, max_windows, bos, json)
    else:
        _refuse(context, PERPLEXITY_OPTIONS, "measures perplexity, --tasks and --task-file accuracy: run them apart")
        result, how = _accuracy(load, names, task_file or [], limit, batch_size, bos, json)
    if card:
        from slablm.checkpoint.card import add_results

        add_results(Path(model), result, how)
    if not json:
        if loading.is_compressed(model):
            next_try(model)
        else:
            next_step("slablm", "compress", model, "OUT")


# What was measured with its number, one or several, and how.
_Results = tuple[list[tuple[str, str]], str]


def _perplexity(load: Any, text: str, seq_len: int, max_windows: int | None, bos: bool, json: bool) -> _Results:
    from slablm.calibration.windows import EvaluationText, adds_bos, check_length
    from slablm.evaluation import perplexity

    if seq_len < 2:
        raise SlabError(f"--seq-len must be 2 or more, got {seq_len}: a window's first token is not predicted")
    read = EvaluationText.read(text, seq_len, max_windows)
    loaded, tokenizer = load()
    check_length(loaded, seq_len)
    windows = read.cut(tokenizer, seq_len, bos=bos).ids
    begun = bos and adds_bos(tokenizer)
    with progress("Evaluating") as step:
        result = perplexity(loaded, windows, step)
    number = _with_error(result.value, result.stderr)
    count = "1 window" if len(windows) == 1 else f"{len(windows)} windows"
    how = f"{count} of {seq_len} tokens{', each begun with BOS' if begun else ''}"
    if json:
        print_json(
            {
                "perplexity": result.value,
                "stderr": result.stderr,
                "windows": len(result.window_losses),
                "tokens": result.tokens,
                "bos": begun,
            }
        )
    else:
        echo(f"perplexity {number} ({how})")
    return [(f"perplexity on {read.excerpt.name}", number)], f"{how}, {_with(loaded)}"


def _accuracy(
    load: Any, names: list[str], files: list[Path], limit: int | None, batch_size: int, bos: bool, json: bool
) -> _Results:
    from slablm.evaluation.zeroshot import load_tasks, score_tasks

    # A wrong name or file is reported before the model is loaded.
    tasks = load_tasks(names, files)
    loaded, tokenizer = load()
    results = score_tasks(loaded, tokenizer, tasks, limit, batch_size, bos=bos)
    mean = sum(result.accuracy for result in results.values()) / len(results)
    if json:
        print_json({"tasks": {name: result.to_dict() for name, result in results.items()}, "mean_accuracy": mean})
    else:
        width = max(map(len, results))
        for name, result in results.items():
            echo(f"{name:{width}}  {_line(result)}")
        if len(results) > 1:
            echo(f"{'mean':{width}}  acc {mean:.3f}")
    return [(name, _line(result)) for name, result in results.items()], f"lm-eval, no examples, {_with(loaded)}"


def _with_error(value: float, stderr: float) -> str:
    """Of a single window or question there is none."""
    return f"{value:.3f}" if math.isnan(stderr) else f"{value:.3f} ± {stderr:.3f}"


def _with(model: Any) -> str:
    """What computed."""
    from slablm.system.versions import versions

    found = versions()
    return f"{str(model.dtype).removeprefix('torch.')}, slablm {found['slablm']}, torch {found['torch']}"


def _line(result: TaskResult) -> str:
    line = f"acc {_with_error(result.accuracy, result.stderr)} ({len(result.correct)} questions)"
    norm = result.to_dict().get("acc_norm")
    return line if norm is None else f"{line}, acc_norm {norm:.3f}"


def _refuse(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Options of the other measurement would be ignored without a word."""
    for name in names:
        if options.typed(context, name):
            raise SlabError(f"--{name.replace('_', '-')} {why}")
