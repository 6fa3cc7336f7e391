"""What the verbs share: options, a console on stderr, a progress bar, tables and JSON on stdout.

Names of layers, files and tasks come from elsewhere and may hold anything. They are printed as they are, never read as
markup, and what could steer a terminal is written out.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from slablm.system.waiting import Tenths

Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="torch device to run on, such as cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last thing on stdout.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]

# Control characters, line and paragraph separators, orders to write backwards, and bytes that are no text.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def console(*, stderr: bool = False) -> Console:
    """A console that takes text for text: no markup, no codes of emojis, no colours by content."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


# Everything that is not a result goes to stderr.
log = console(stderr=True)


def printable(text: object, keep: str = "") -> str:
    """Text in one line that does nothing to a terminal: such characters are written out.

    Args:
        text: anything.
        keep: characters to leave as they are.
    """
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], str(text))


def say(line: object) -> None:
    """One line on stderr about what is going on."""
    log.print(printable(line), soft_wrap=True)


def say_if_quantized(source: str) -> None:
    """One line on stderr if a model's weights come from a quantised file, and so are no dense model's.

    Args:
        source: as for `slablm.dense.loading.load`.

    Raises:
        SlabError: it is a GGUF file that is missing.
    """
    from slablm.dense.loading import quantized_as

    if formats := quantized_as(source):
        say(f"{source}: weights come from a {formats} file, so they lie on its grid")


def echo(line: object) -> None:
    """One line of a result on stdout."""
    typer.echo(printable(line))


class TextTable(Table):
    """A table whose cells are text from anywhere."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a line of cells."""
        super().add_row(*(None if cell is None else printable(cell) for cell in cells), **options)


class Waiting(Protocol):
    """Told how far something is."""

    def __call__(self, done: int, total: int, *others: Any) -> None:
        """Steps done, and steps in all, 0 if unknown yet; what callers know besides is of no interest here."""

    def describe(self, description: str) -> None:
        """What is done from now on."""


@contextmanager
def progress(description: str) -> Iterator[Waiting]:
    """Show on stderr how far something is, and what is left: a bar on a terminal, elsewhere a line each 10 %.

    The bar is there from the first step on: until then those of other libraries have the terminal to themselves.
    """
    if not log.is_terminal:
        yield Tenths(description, say)
        return
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=log)
    try:
        yield _Bar(bar, bar.add_task(printable(description), total=None))
    finally:
        bar.stop()


class _Bar:
    """On a terminal."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self.bar, self.task = bar, task

    def __call__(self, done: int, total: int, *others: Any) -> None:
        self.bar.start()
        if total:
            self.bar.update(self.task, completed=done, total=total)

    def describe(self, description: str) -> None:
        self.bar.update(self.task, description=printable(description))


def next_step(*command: object) -> None:
    """One line on stderr about what can be typed next, for who sits at a terminal."""
    if log.is_terminal:
        say(f"next: {shlex.join(map(str, command))}")


def next_try(model: object) -> None:
    """How to see a model write: in a conversation if it is made for that."""
    if (Path(str(model)) / "chat_template.jinja").exists():
        next_step("slablm", "chat", model)
    else:
        next_step("slablm", "generate", model, "The capital of France is")


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout; NaN becomes null, as JSON has none."""
    clean = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in data.items()}
    typer.echo(json.dumps(clean))


def print_table(title: str, columns: Sequence[str], body: Sequence[tuple[str, ...]]) -> None:
    """A table on stdout, its lines grouped by the first column; the first two columns are text, the others numbers."""
    from rich.box import SIMPLE

    table = TextTable(title=title, box=SIMPLE)
    for index, column in enumerate(columns):
        table.add_column(printable(column, "\n"), justify="left" if index < 2 else "right", no_wrap=True)
    for before, line in zip([None, *body], body, strict=False):
        if before is not None and before[0] != line[0]:
            table.add_section()
        table.add_row(*line)
    shown = console()
    # A file or a narrow terminal gets whole lines as well: a cut number is worse than a wrapped line.
    wide = console()
    wide.width = 1000
    shown.width = max(shown.width, wide.measure(table).maximum)
    shown.print(table)
