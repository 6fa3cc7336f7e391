"""The plots of a comparison, drawn by matplotlib without a display.

A method has the same colour and the same marker in every plot, both by its place in `METHODS`; patterns differ by how
the marker is filled. So nothing hangs on colour alone. The colours are those of Okabe and Ito for the most part, told
apart with any kind of colour vision.

Inside the report a plot is SVG with its colours as CSS variables, so that it follows the reader's light or dark scheme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slablm.comparison.cells import Cell
from slablm.comparison.records import Record
from slablm.comparison.rivals import DENSE
from slablm.errors import SlabError
from slablm.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# On a light and on a dark background.
COLOURS = (
    ("#0072b2", "#56a8e8"),
    ("#d55e00", "#ff8a3d"),
    ("#8c6d46", "#c9a777"),
    ("#009e73", "#2fc79b"),
    ("#cc5fa0", "#ee9bcb"),
    ("#7a3fb5", "#b58cf0"),
    ("#b8860b", "#e3bd4b"),
    ("#5f6b00", "#b3c043"),
    ("#a6262b", "#f27c80"),
    ("#2b3a67", "#9fb0e8"),
    ("#00838f", "#4dd0e1"),
    ("#6d4c5b", "#c7a3b3"),
    ("#4a4f55", "#b9c0c8"),
    ("#1b7f3b", "#7ddc9a"),
    ("#9c3587", "#e59fd6"),
)
INK, GRID = ("#1c1d1f", "#e6e6e3"), ("#d9dadc", "#3a3d42")
# Bars of the dense model, on both backgrounds: error bars in ink show on it.
GREY = "#8f949b"
MARKERS = "os^DvPX<>*phd8H"
FILLS = ("full", "none", "left", "top")
UNSTRUCTURED = "unstructured"
# 5 inches become 360 CSS pixels on a phone, where 10 points are still 8.
WIDTH = 5.0
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "slablm",
    "figure.constrained_layout.use": True,
    "axes.edgecolor": INK[0],
    "axes.labelcolor": INK[0],
    "text.color": INK[0],
    "xtick.color": INK[0],
    "ytick.color": INK[0],
    "grid.color": GRID[0],
}


def require_matplotlib() -> None:
    """Say early what is missing.

    Raises:
        SlabError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SlabError("plots need matplotlib: pip install 'slablm[report]'") from error


def perplexity_plot(records: Sequence[Record]) -> Figure:
    """Perplexity (log scale) over true bits per weight, one point per cell, one line per method; rivals by name.

    Args:
        records: all cells, the dense one among them.
    """
    with _figure(1, 1, 4.4) as (figure, axes):
        plot = axes[0]
        methods = _methods(records)
        variants = list(dict.fromkeys(_variant(r.cell) for r in records if r.cell.config))
        for method in methods:
            for variant in variants:
                group = [r for r in records if r.cell.method == method and _variant(r.cell) == variant]
                if not group:
                    continue
                group.sort(key=lambda record: record.bits_per_weight)
                line = plot.plot(
                    [r.bits_per_weight for r in group],
                    [r.perplexity.value for r in group],
                    # N:M cells are not steps of one series.
                    linestyle="-" if variant == UNSTRUCTURED or group[0].cell.quantizes else "none",
                    fillstyle=_fill(variant, variants),
                    **_look(method, 7),
                )[0]
                line.set_gid(f"data {method} {variant}")
        for record in (r for r in records if r.cell.rival):
            at = record.bits_per_weight, record.perplexity.value
            plot.plot(*at, color=INK[0], marker="x", markersize=6)[0].set_gid(f"data {record.cell.method}")
            plot.annotate(record.cell.method, at, xytext=(4, 3), textcoords="offset points", fontsize=7)
        dense = next(r for r in records if r.cell.dense).perplexity.value
        plot.axhline(dense, color=INK[0], linestyle="--", linewidth=1)
        plot.set_yscale("log")
        _label_log_axis(plot)
        plot.set_xlabel("true bits per weight")
        plot.set_ylabel("perplexity (log scale)")
        handles = [_handle(method, 7, _look(method, 7)) for method in methods]
        handles.append(_handle(f"dense, {dense:.2f}", 0, {"color": INK[0], "linestyle": "--", "linewidth": 1}))
        plain = {"color": INK[0], "marker": "o", "linestyle": "none"}
        handles += [_handle(v, 7, plain | {"fillstyle": _fill(v, variants)}) for v in variants if _alike(v, variants)]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        return figure


def error_plot(records: Sequence[Record]) -> Figure:
    """Relative output error of every layer over depth, one panel per projection.

    Args:
        records: cells of one setting.
    """
    require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    projections = list(dict.fromkeys(place(name)[1] for record in records for name in record.layer_errors))
    columns = min(2, len(projections))
    lines = -(-len(projections) // columns)
    with _figure(lines, columns, 1.0 + 1.75 * lines) as (figure, axes):
        for plot, projection in zip(axes, projections, strict=False):
            for record in records:
                depths = _by_depth(record, projection)
                line = plot.plot(list(depths), list(depths.values()), **_look(record.cell.method, 3))[0]
                line.set_gid(f"data {record.cell.method} {projection}")
            plot.set_title(projection, fontsize=10)
            plot.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for plot in axes[len(projections) :]:
            plot.remove()
        for plot in axes[: len(projections)][-columns:]:  # the lowest of each column
            plot.tick_params(labelbottom=True)
        axes[0].set_ylim(bottom=0)
        figure.supxlabel("decoder block", fontsize=10)
        figure.supylabel("relative output error ‖(W − Ŵ)X‖ / ‖WX‖", fontsize=10)
        methods = _methods(records)
        figure.legend(
            handles=[_handle(method, 6, _look(method, 6)) for method in methods], loc="outside upper center", ncols=3
        )
        return figure


def accuracy_plot(records: Sequence[Record]) -> Figure:
    """Accuracy of every task as bars, one per method, with standard errors.

    Args:
        records: cells of one setting, and the dense one if wanted, all with `accuracies`.
    """
    tasks = list(records[0].accuracies or {})
    height = 0.8 / len(records)
    with _figure(1, 1, 1.4 + 0.24 * len(tasks) * (len(records) + 1)) as (figure, axes):
        plot = axes[0]
        for index, record in enumerate(records):
            results = [(record.accuracies or {})[task] for task in tasks]
            bars = plot.barh(
                [row + (index - (len(records) - 1) / 2) * height for row in range(len(tasks))],
                [100 * result["acc"] for result in results],
                height=0.9 * height,
                xerr=[100 * result["stderr"] for result in results],
                color=_colour(record.cell.method),
                ecolor=INK[0],
                error_kw={"linewidth": 1, "capsize": 2},
                label=record.cell.method,
            )
            for bar in bars:
                bar.set_gid(f"data {record.cell.method}")
        plot.set_yticks(range(len(tasks)), tasks)
        plot.margins(y=0.02)
        plot.invert_yaxis()
        plot.grid(visible=False, axis="y")
        plot.set_xlim(0, 100)
        plot.set_xlabel("accuracy in % (± standard error)")
        figure.legend(loc="outside upper center", ncols=3)
        return figure


def place(name: str) -> tuple[int, str]:
    """Depth and projection of a layer: ``model.layers.3.mlp.up_proj`` → (3, ``mlp.up_proj``).

    The first number in the name counts the blocks; further ones (experts) are left out.
    """
    parts = name.split(".")
    first = next(i for i, part in enumerate(parts) if part.isdigit())
    return int(parts[first]), ".".join(part for part in parts[first + 1 :] if not part.isdigit())


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a plot as ``name.png`` and ``name.svg``."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
        figure.savefig(folder / f"{name}.svg", facecolor="white", metadata={"Date": None})


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """A plot as an SVG element to be put into HTML.

    Args:
        figure: the plot.
        name: unique on the page; goes in front of all ids.
        title: what a screen reader says.
    """
    import html

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # HTML knows the namespaces of SVG; ids must be unique on the page.
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="|url\(#|href="#', lambda match: f"{match[0]}{name}-", text)
    text = re.sub(r'(id="[^"]*")', lambda match: match[0].replace(" ", "_"), text)
    for index, (light, _) in enumerate(COLOURS):
        text = text.replace(light, f"var(--series-{index})")
    text = text.replace(INK[0], "var(--ink)").replace(GRID[0], "var(--grid)")
    label = html.escape(title, quote=True)
    return re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text)


@contextmanager
def _figure(lines: int, columns: int, height: float) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure `WIDTH` inches wide in the common style, and its axes in reading order."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure as NewFigure

    with matplotlib.rc_context(STYLE):
        figure = NewFigure(figsize=(WIDTH, height))
        axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        yield figure, list(axes.flat)


def _methods(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.cell.method for record in records if record.cell.config))


def _colour(method: str) -> str:
    return GREY if method == DENSE else COLOURS[list(METHODS).index(method) % len(COLOURS)][0]


def _look(method: str, size: float) -> dict[str, Any]:
    marker = MARKERS[list(METHODS).index(method) % len(MARKERS)]
    return {"color": _colour(method), "marker": marker, "markersize": size, "linewidth": 1.4}


def _handle(label: str, size: float, look: dict[str, Any]) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **(look | {"markersize": size}))


def _variant(cell: Cell) -> str:
    """What a marker's filling stands for: the pattern, or the group size of a quantizer."""
    if cell.config is None:
        return DENSE
    return f"group {cell.config.group_size}" if cell.quantizes else cell.config.pattern


def _fill(variant: str, variants: Sequence[str]) -> str:
    """Unstructured cells and the first group size are filled, others not or by half."""
    kind = [variant, *_alike(variant, variants)]
    kind.sort(key=[UNSTRUCTURED, *variants].index)
    offset = 0 if variant.startswith("group") or kind[0] == UNSTRUCTURED else 1
    return FILLS[(offset + kind.index(variant)) % len(FILLS)]


def _alike(variant: str, variants: Sequence[str]) -> list[str]:
    """The other patterns, for a pattern; the other group sizes, for a group size."""
    return [v for v in variants if v != variant and v.startswith("group") == variant.startswith("group")]


def _by_depth(record: Record, projection: str) -> dict[int, float]:
    """Mean error at each depth (several layers share a place in a mixture of experts)."""
    errors: dict[int, list[float]] = {}
    for name, error in record.layer_errors.items():
        depth, where = place(name)
        if where == projection:
            errors.setdefault(depth, []).append(error)
    return {depth: sum(values) / len(values) for depth, values in errors.items()}


def _label_log_axis(plot: Axes) -> None:
    """Plain numbers at 1, 2, 5, 10, …; evenly spaced ones where that would leave the axis bare."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = plot.get_ylim()
    plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 8 else MaxNLocator(6))
    plot.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    plot.yaxis.set_minor_locator(NullLocator())
