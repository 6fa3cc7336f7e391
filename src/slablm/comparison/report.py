"""One HTML file that holds a whole comparison: opens offline, on a phone as well, needs no script.

The page is a jinja2 template with inline styles and inline SVG; everything that comes from the user is escaped. The
plots are also written beside it, as PNG and SVG files in ``plots/``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from slablm.comparison import plots, table
from slablm.comparison.records import Record
from slablm.comparison.rivals import DENSE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"
PLOTS = "plots"
TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Plot:
    """A plot on the page.

    Attributes:
        title: its heading.
        svg: the inline element.
        files: path of the files beside the report, without the ending.
    """

    title: str
    svg: Markup
    files: str


def write_report(records: Sequence[Record], folder: Path, description: dict[str, Any], command: str) -> Path:
    """Write ``report.html`` and ``plots/``.

    Args:
        records: all cells, the dense one among them.
        folder: where to; existing files of these names are replaced.
        description: settings to show.
        command: the command line that made it.

    Returns:
        Path of the report.

    Raises:
        SlabError: matplotlib is not installed.
    """
    plots.require_matplotlib()
    (folder / PLOTS).mkdir(parents=True, exist_ok=True)
    report = folder / REPORT
    report.write_text(_render(records, folder, description, command), encoding="utf-8")
    return report


def _render(records: Sequence[Record], folder: Path, description: dict[str, Any], command: str) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(
        resources.files("slablm.comparison").joinpath(TEMPLATE).read_text(encoding="utf-8")
    )
    records = table.pooled(records)
    measured = [record for record in records if record.accuracies]
    return template.render(
        table=table,
        records=records,
        rows=table.rows(records),
        verdicts=table.verdicts(records),
        headline=table.headline(records),
        quantizers=any(record.cell.quantizes for record in records),
        stronger=table.stronger_quantizers(records),
        tasks=list(measured[0].accuracies or {}) if measured else [],
        perplexity_plot=_plot(plots.perplexity_plot(records), folder, "Perplexity over size"),
        accuracy_plots=_accuracy_plots(measured, folder),
        error_plots=_error_plots(records, folder),
        colours=plots.COLOURS,
        ink=plots.INK,
        grid=plots.GRID,
        description=description,
        versions=_versions(records),
        command=command,
        texts=list(records[0].texts),
        draws=any(record.main.draws for record in records),
        single_window=len(records[0].perplexity.window_losses) < 2,
    )


def _error_plots(records: Sequence[Record], folder: Path) -> list[Plot]:
    return [
        _plot(plots.error_plot(group), folder, f"Layer errors, {setting}")
        for setting, group in table.settings(records).items()
    ]


def _accuracy_plots(measured: Sequence[Record], folder: Path) -> list[Plot]:
    dense = [record for record in measured if record.cell.method == DENSE]
    return [
        _plot(plots.accuracy_plot([*dense, *group]), folder, f"Accuracy, {setting}")
        for setting, group in table.settings(measured).items()
    ]


def _plot(figure: Figure, folder: Path, title: str) -> Plot:
    """Save a figure and make it a part of the page."""
    # "Layer errors, 50 % 2:4" → layer-errors-50-2-4
    name = re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-")
    plots.save(figure, folder / PLOTS, name)
    return Plot(title, Markup(plots.inline_svg(figure, name, title)), f"{PLOTS}/{name}")


def _versions(records: Sequence[Record]) -> dict[str, str]:
    """Versions the cells were measured with; several where a run was continued after an upgrade."""
    found: dict[str, list[str]] = {}
    for record in records:
        for name, version in record.versions.items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: ", ".join(versions) for name, versions in found.items()}
