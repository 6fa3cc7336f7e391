"""``slablm compare``: many methods on one model, one table, one report."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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
    print_json,
    print_table,
    progress,
    say,
    say_if_quantized,
)
from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.system.waiting import duration

if TYPE_CHECKING:
    from slablm.comparison.cells import Cell, Grid
    from slablm.comparison.protocol import Court
    from slablm.comparison.records import Record, ResultsFile
    from slablm.comparison.rivals import Rival
    from slablm.comparison.table import Row

T = TypeVar("T")
RESULTS = "results.jsonl"


def compare(
    context: typer.Context,
    model: options.Dense,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, report.html and plots.")],
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "slab,wanda,sparsegpt",
    ratios: Annotated[str, typer.Option(help="Compression ratios of the unstructured cells.")] = "0.5,0.6,0.7,0.8",
    patterns: Annotated[str, typer.Option(help="unstructured and N:M patterns; N:M is measured at ratio 1 - N/M.")] = (
        "unstructured,2:4,4:8"
    ),
    bits: Annotated[str, typer.Option(help="Bits per code of the quantizers rtn, gptq and awq.")] = "3,4,8",
    group_size: Annotated[str, typer.Option(help="Group sizes of the quantizers.")] = "128",
    bits_per_weight: Annotated[str, typer.Option(help="True bits per weight of the cells of slab+.")] = "4",
    rival: Annotated[
        list[str] | None,
        typer.Option(help="A compressed model from a file, as NAME=PATH (GGUF or a folder); repeat for several."),
    ] = None,
    calibration: options.Calibration = "c4",
    num_samples: Annotated[int, typer.Option(help="Calibration windows, the same for every method.")] = 128,
    draws: Annotated[int, typer.Option(min=1, help="Measure each cell with so many draws of these windows.")] = 1,
    seq_len: options.SeqLen = 2048,
    bos: options.Bos = True,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluation: wikitext2 (the default), c4, builtin or a text file, TEXT@6-/40 for some of its "
            "windows; repeat for several, the main one first."
        ),
    ] = None,
    development: Annotated[
        list[str] | None,
        typer.Option(help="Windows on which choices were made, as TEXT@0-5: refused if they overlap; repeat."),
    ] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Evaluate on the first windows only.")] = None,
    eval_seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens per evaluation window; as --seq-len.")] = None,
    tasks: Annotated[str, typer.Option(help="Zero-shot tasks of lm-eval, separated by commas.")] = "",
    task_file: Annotated[list[Path] | None, typer.Option(help="A local task file; repeat for several.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each task.")] = None,
    targets: options.TargetNames = None,
    ignore: options.IgnoredNames = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: options.Seed = 0,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Compare methods on MODEL, cell by cell; run it again to continue where it was stopped."""
    from slablm.comparison.cells import Grid
    from slablm.comparison.measure import Tasks
    from slablm.comparison.protocol import Court
    from slablm.comparison.rivals import parse_all
    from slablm.comparison.table import pooled

    grid = Grid(
        tuple(_split(methods)),
        tuple(_numbers(ratios, float, "--ratios")),
        tuple(_split(patterns)),
        tuple(_numbers(bits, int, "--bits")),
        tuple(_numbers(group_size, int, "--group-size")),
        tuple(_numbers(bits_per_weight, float, "--bits-per-weight")),
        draws,
    )
    config = options.config(context, "calibration", "num_samples", "seq_len", "bos", "targets", "ignore", "seed")
    court = Court(
        tuple(text or ("wikitext2",)), tuple(development or ()), max_windows, eval_seq_len or seq_len,
        Tasks(tuple(_split(tasks)), tuple(task_file or ()), limit),
    )  # fmt: skip
    records = run(
        model, out, grid, config, court, parse_all(rival or ()), dtype=dtype, device=device,
        revision=revision, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    _show(pooled(records), out, json)
    if not json:
        next_step("slablm", "compress", model, "OUT")


def run(
    source: str,
    out: Path,
    grid: Grid,
    config: CompressionConfig,
    court: Court,
    rivals: Sequence[Rival] = (),
    **load_options: Any,
) -> list[Record]:
    """Check, measure what is missing, write the report; returns all records.

    Args:
        source: the dense model, as for `slablm.dense.loading.load`.
        out: folder of the results.
        grid: what to compare.
        config: all other settings of the methods.
        court: what to judge by.
        rivals: models from files.
        load_options: dtype, device and so on for `slablm.dense.loading.load`.

    Raises:
        SlabError: any bad input. Cheap checks come before the model is loaded.
    """
    from slablm.comparison.cells import Cell
    from slablm.comparison.measure import cell_key, measure_cells
    from slablm.comparison.plots import require_matplotlib
    from slablm.comparison.records import ResultsFile
    from slablm.comparison.report import write_report
    from slablm.dense import loading
    from slablm.dense.loading import quiet_libraries

    cells = [*grid.cells(config, alone=not rivals), *(Cell(rival=rival) for rival in rivals)]
    require_matplotlib()
    loading.check_dense(source)
    results = ResultsFile(out / RESULTS)
    hearing = court.read()
    quiet_libraries()
    say(f"Loading {source}")
    say_if_quantized(source)
    conditions = hearing.conditions(source, config, grid.draws, load_options)
    keys = {cell: cell_key(cell, conditions) for cell in cells}  # once: a rival's file is read for it
    with _reporting(keys, results) as (on_cell, on_step):
        records = measure_cells(keys, conditions, results, on_cell, on_step)
    say("Writing the report")
    command = shlex.join(["slablm", *sys.argv[1:]])
    write_report(records, out, conditions.description | {"seed": config.seed}, command)
    return records


@contextmanager
def _reporting(
    keys: Mapping[Cell, str], results: ResultsFile
) -> Iterator[tuple[Callable[[Record, bool], None], Callable[[str, int, int], None]]]:
    """The callbacks of `measure_cells`: a bar within each cell; a line with the time left after each."""
    from slablm.comparison.table import show_perplexity

    cells = list(keys)
    missing = [cell for cell, key in keys.items() if results.get(key) is None]
    say(f"{len(cells)} cells, {len(cells) - len(missing)} of them finished before")
    start = time.perf_counter()
    done = measured = 0
    with progress("Starting") as step:

        def on_cell(record: Record, new: bool) -> None:
            nonlocal done, measured
            done, measured = done + 1, measured + new
            if not new:
                return
            left = (time.perf_counter() - start) / measured * (len(missing) - measured)
            say(
                f"[{done}/{len(cells)}] {record.cell.label}: perplexity {show_perplexity(record)}, "
                f"{record.bits_per_weight:.2f} true bits per weight, ETA {duration(left)}"
            )

        def on_step(what: str, steps_done: int, steps: int) -> None:
            step.describe(f"cell {done + 1}/{len(cells)}: {cells[done].label}, {what}")
            step(steps_done, steps)

        yield on_cell, on_step


def _show(records: Sequence[Record], out: Path, json: bool) -> None:
    """The final tables, or the JSON object."""
    from slablm.comparison.report import REPORT
    from slablm.comparison.table import headline, rows

    lines = rows(records)
    if json:
        print_json(
            {
                "headline": headline(records),
                "rows": [line.to_dict() for line in lines],
                "results": str(out / RESULTS),
                "report": str(out / REPORT),
            }
        )
        return
    _print_perplexities(lines)
    if records[0].accuracies:
        _print_accuracies(lines, list(records[0].accuracies))
    echo(headline(records))
    echo(f"report: {out / REPORT}")


def _print_perplexities(lines: Sequence[Row]) -> None:
    from slablm.comparison.table import show_divergence, show_drift, show_model_bits, show_perplexity, show_relative

    main, *others = lines[0].record.texts
    body = [
        (
            "" if line.record.cell.dense else line.record.cell.setting,
            line.record.cell.method,
            f"{line.record.compression_ratio:.3f}",
            f"{line.record.bits_per_weight:.2f}",
            show_model_bits(line.record),
            show_perplexity(line.record),
            f"{line.record.ratio_to_dense:.2f}",
            show_divergence(line.record.main),
            show_drift(line.record),
            show_relative(line.loss) if line.loss else "reference" if line.reference else "",
            *(show_perplexity(line.record, text) for text in others),
        )
        for line in lines
    ]
    print_table(
        f"Perplexity on {main}",
        ("setting", "method", "ratio\n(paper)", "true bits\nper weight", "of the\nwhole model",
         "perplexity\n± std. error", "× dense",
         "KL divergence\nmean (median, 99 %)", "drift", "against\nreference [95 %]",
         *(f"on {text}" for text in others)),
        body,
    )  # fmt: skip


def _print_accuracies(lines: Sequence[Row], tasks: Sequence[str]) -> None:
    from slablm.comparison.table import show_accuracy, show_average, show_points

    body = []
    for line in lines:
        record, results = line.record, line.record.accuracies or {}
        difference = show_points(line.accuracy) if line.accuracy else "reference" if line.reference else ""
        each = (show_accuracy(results[task]["acc"], results[task]["stderr"]) for task in tasks)
        setting = record.cell.setting if record.cell.config else ""
        body.append((setting, record.cell.method, show_average(record), difference, *each))
    print_table("Accuracy in %", ("setting", "method", "average", "against\nreference [95 %]", *tasks), body)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str, kind: Callable[[str], T], option: str) -> list[T]:
    numbers = []
    for part in _split(text):
        try:
            numbers.append(kind(part))
        except ValueError:
            raise SlabError(f"{option}: {part!r} is no number; separate several by commas") from None
    return numbers
