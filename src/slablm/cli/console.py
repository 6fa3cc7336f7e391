"""What the verbs share: options, a console on stderr, a progress bar, tables and JSON on stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="torch device to run on, such as cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last thing on stdout.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run model code that comes with the checkpoint.")]

# Everything that is not a result goes to stderr.
log = Console(stderr=True, highlight=False)


@contextmanager
def progress(description: str) -> Iterator[tuple[Progress, Any]]:
    """A progress bar with elapsed and remaining time on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=log, transient=not log.is_terminal) as bar:
        yield bar, bar.add_task(description, total=None)


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout; NaN becomes null, as JSON has none."""
    clean = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in data.items()}
    typer.echo(json.dumps(clean))


def print_table(title: str, columns: Sequence[str], body: Sequence[tuple[str, ...]]) -> None:
    """A table on stdout, its lines grouped by the first column; the first two columns are text, the others numbers."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title=title, box=SIMPLE)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    for before, line in zip([None, *body], body, strict=False):
        if before is not None and before[0] != line[0]:
            table.add_section()
        table.add_row(*line)
    console = Console(highlight=False, markup=False)
    # A file or a narrow terminal gets whole lines as well: a cut number is worse than a wrapped line.
    console.width = max(console.width, Console(width=1000).measure(table).maximum)
    console.print(table)
