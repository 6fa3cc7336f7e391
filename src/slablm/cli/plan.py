"""``slablm plan``: what a compression would give, take and need, before it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slablm.cli import options
from slablm.cli.console import Json, TextTable, console, next_step, print_json, printable, say_if_quantized

if TYPE_CHECKING:
    from rich.table import Table

    from slablm.planning.memory import Part
    from slablm.planning.plan import Plan


@options.spread
def plan(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hub id, local folder (config.json is enough), .gguf file or 'smollm2'."),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Where the result would be; only its free space matters.")
    ] = Path("out"),
    *,
    settings: options.Settings,
    source: options.Source,
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes that torchrun will start; memory and time are of one.")
    ] = 1,
    json: Json = False,
) -> None:
    """Say what compressing MODEL would give, take and need. No weight is read.

    The options are those of compress. The exit status is 1 if it is impossible on this machine.
    """
    from slablm.dense.loading import quiet_libraries
    from slablm.planning.plan import plan as make_plan
    from slablm.system.distributed import World

    quiet_libraries()
    say_if_quantized(model)
    run = options.run_options(settings, source, world=World(size=ranks))
    result = make_plan(model, options.config(context), options=run, out=out)
    if json:
        print_json(result.to_dict())
    else:
        _show(result)
    if result.problems:
        raise typer.Exit(1)
    if not json:
        start = ["slablm"] if ranks == 1 else ["torchrun", "--standalone", "--nproc-per-node", ranks, "-m", "slablm"]
        next_step(*start, "compress", *_as_typed(), *([] if options.typed(context, "out") else [out]))


def _as_typed() -> list[str]:
    """What was typed behind the verb, but for the one option that compress has not."""
    words = sys.argv[sys.argv.index("plan") + 1 :]
    pairs = zip(words, ["", *words], strict=False)
    return [word for word, before in pairs if not word.startswith("--ranks") and before != "--ranks"]


def _show(plan: Plan) -> None:
    shown = console()
    for table in _tables(plan):
        shown.print(table)
    for line in _remarks(plan):
        shown.print(printable(line))
    for problem in plan.problems:
        shown.print(printable(f"impossible: {problem}"))
    if not plan.problems:
        shown.print("nothing stands in the way")


def _tables(plan: Plan) -> list[Table]:
    layers = _table("Layers", "layer", "number", "shape", "form", "bits", "ratio")
    if plan.outlook is None:
        return []
    groups: dict[tuple[str, tuple[int, int], str], list[Any]] = {}
    for report in plan.outlook.size.layers:
        groups.setdefault((_without_number(report.name), report.shape, report.form), []).append(report)
    for (name, (m, n), form), reports in groups.items():
        r = reports[0]
        sizes = form, f"{r.bits_per_weight:.3f}", f"{r.compression_ratio:.4f}"
        layers.add_row(name, str(len(reports)), f"{m}×{n}", *sizes)
    return [layers, *_needs(plan)]


def _needs(plan: Plan) -> list[Table]:
    from slablm.system.memory import human_bytes

    assert plan.outlook is not None
    size, memory, disk = plan.outlook.size, plan.outlook.memory, plan.outlook.disk
    result = _table("Result", "", "")
    result.show_header = False
    files = f" in {size.files} files" if size.files > 1 else ""
    for name, value in {
        "true bits per weight (headers included)": f"{size.bits_per_weight:.3f}",
        "true bits per weight of the whole model": f"{size.model_bits_per_weight:.3f}",
        "compression ratio (paper, positions not counted)": f"{size.compression_ratio:.4f}",
        "head and embedding": f"{size.head_bits} bits",
        "weights on disk": human_bytes(size.file_bytes) + files,
        "dense weights": human_bytes(size.dense_bytes),
    }.items():
        result.add_row(name, value)
    held = _table(f"Peak memory, while: {memory.largest.name}", "", "")
    _fill(held, [part for part in memory.largest.parts if not part.on_device], memory.base_bytes)
    device = _table(f"Peak memory of the device, while: {memory.device_phase.name}", "", "")
    _fill(device, [part for part in memory.device_phase.parts if part.on_device], 0)
    space = _table("Disk", "", "")
    space.show_header = False
    for name, count in {
        "result": disk.result_bytes,
        "finished blocks until then": disk.journal_bytes,
        "hidden states in a file, before the result": disk.spilled_bytes,
        "needed at a time": disk.needed_bytes,
        "free": disk.free_bytes,
    }.items():
        space.add_row(name, human_bytes(count))
    return [result, held, *([device] if device.row_count > 1 else []), space]


def _fill(table: Table, parts: list[Part], base: int) -> None:
    from slablm.system.memory import human_bytes

    table.show_header = False
    if base:
        table.add_row("interpreter, libraries, tokenizer (measured here)", human_bytes(base))
    for part in parts:
        table.add_row(part.name, human_bytes(part.bytes))
    table.add_row("together", human_bytes(base + sum(part.bytes for part in parts)))


def _remarks(plan: Plan) -> list[str]:
    lines = [f"note: {note}" for note in plan.notes]
    left = Counter((_without_number(name), reason) for name, reason in plan.targets.left_dense.items())
    lines += [f"left dense: {name} ({reason}), {count} times" for (name, reason), count in left.items()]
    rows = plan.config.head_bits == 8
    kept = "norms" if rows else "embeddings, head and norms"
    lines.append(f"left dense: {kept} (outside the blocks, or no matrices)")
    if rows:
        lines.append("head and embedding: int8, with an FP16 scale per row")
    if plan.whole_because:
        lines.append(f"the whole model will be in memory: {plan.whole_because}")
    if plan.duration is not None:
        times = _time(plan.duration.calibration), _time(plan.duration.decomposition)
        lines.append(
            f"time, an estimate from a short measurement on this machine: about {_time(plan.duration.total)} "
            f"(calibration {times[0]}, decomposition {times[1]}; without reading and writing files)"
        )
    return lines


def _table(title: str, *columns: str) -> Table:
    from rich.box import SIMPLE

    table = TextTable(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _without_number(name: str) -> str:
    """A name that layers of all blocks and experts share: layers.0.mlp.experts.3.up_proj → mlp.experts.up_proj."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(part for part in parts[numbers[0] + 1 :] if not part.isdigit()) if numbers else name


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
