"""Quality per true bit: perplexity on two texts that calibration has not seen, for any settings of any method.

Each `--cell` is a list of settings (`slablm.config.CompressionConfig`) such as `method=slab+,bits_per_weight=3.5`; all
others are the defaults, with the calibration text given here. The model is compressed once per cell, and its
perplexity taken on some windows of the calibration text behind those that calibrate, and on the first windows of the
evaluation text. Finished cells are kept in the folder `--out` as with `slablm compare`, and a cell that is there is not
measured again; without `--cell` the table and the plot of what is there are made anew.

    python benchmarks/pareto.py smollm2 --calibration c4-sample.txt --text wikitext2-test.txt --out DIR \
        --cell method=rtn,value_bits=4,group_size=64 --cell method=slab+,bits_per_weight=3.5
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from slablm.calibration.text import calibration_windows, load_text, windows_from_text
from slablm.comparison.cells import Cell
from slablm.comparison.measure import Conditions, Tasks, measure_cells, model_digest
from slablm.comparison.records import Record, ResultsFile
from slablm.config import CompressionConfig
from slablm.dense import loading
from slablm.evaluation.perplexity import Perplexity

SEQ_LEN = 2048
# Windows of the calibration text from here on are for evaluation.
FIRST_UNSEEN = 130


@dataclass(frozen=True)
class Texts:
    """The two evaluation texts, of equally many windows each."""

    calibration: Path
    evaluation: Path
    windows: int


def main(
    source: str,
    calibration: Annotated[Path, typer.Option()],
    text: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()],
    cell: Annotated[list[str] | None, typer.Option(help="Settings, separated by commas; may be repeated.")] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration windows of cells that do not say.")] = 64,
    windows: Annotated[int, typer.Option(help="Evaluation windows of each text.")] = 8,
) -> None:
    """Measure cells and print the table of all that are in the folder."""
    results = ResultsFile(out / "results.jsonl")
    base = CompressionConfig(calibration=str(calibration), num_samples=num_samples, seq_len=SEQ_LEN)
    configs = [parse(spec, base) for spec in cell or []]
    texts = Texts(calibration, text, windows)
    if configs:
        measure(source, configs, texts, results)
    records = read(results)
    print(table(records))
    plot(records, out / "pareto.png")


def parse(spec: str, base: CompressionConfig) -> CompressionConfig:
    """`method=slab+,ratio=0.5` → settings."""
    settings: dict[str, Any] = {}
    for part in spec.split(","):
        name, _, value = part.partition("=")
        try:
            settings[name] = json.loads(value)
        except ValueError:  # a word needs no quotes here
            settings[name] = value
    return replace(base, **settings)


def evaluation_windows(tokenizer: Any, texts: Texts) -> tuple[Tensor, Tensor]:
    """Token ids, [windows, SEQ_LEN] each: windows behind those that calibrate, and the first of the other text."""
    same = load_text(str(texts.calibration), split="calibration")
    other = load_text(str(texts.evaluation), split="evaluation")
    last = FIRST_UNSEEN + texts.windows
    return (
        windows_from_text(same, tokenizer, SEQ_LEN, last, str(texts.calibration))[FIRST_UNSEEN:],
        windows_from_text(other, tokenizer, SEQ_LEN, texts.windows, str(texts.evaluation)),
    )


def measure(source: str, configs: Sequence[CompressionConfig], texts: Texts, results: ResultsFile) -> None:
    """Append what is missing to the results; the dense model comes first."""
    model, tokenizer = loading.load(source)
    digest, evaluation = model_digest(model), torch.cat(evaluation_windows(tokenizer, texts))
    for config in configs:
        assert config.num_samples <= FIRST_UNSEEN
        conditions = Conditions(
            load=lambda: loading.load(source)[0],
            tokenizer=tokenizer,
            model_digest=digest,
            calibration=calibration_windows(model, tokenizer, config),
            evaluation=evaluation,
            tasks=Tasks(),
            description={
                "model": source,
                "calibration windows": config.num_samples,
                "evaluation": f"{texts.windows} windows of {texts.calibration.name} from {FIRST_UNSEEN} on, "
                f"then the first {texts.windows} of {texts.evaluation.name}",
                "threads": torch.get_num_threads(),
            },
        )
        measure_cells([Cell(None), Cell(config)], conditions, results, announce, lambda what, done, total: None)


def announce(record: Record, new: bool) -> None:
    """One line per cell that was measured just now."""
    if new:
        print(row(record), flush=True)


def read(results: ResultsFile) -> list[Record]:
    """All records, by method and size."""
    lines = results.path.read_text().splitlines()
    records = [Record.from_dict(json.loads(line)) for line in lines]
    return sorted(records, key=lambda record: (record.cell.method, record.bits_per_weight, setting(record)))


def setting(record: Record) -> str:
    """Settings of a cell, the number of calibration windows included."""
    config = record.cell.config
    return record.cell.setting if config is None else f"{record.cell.setting}, {config.num_samples} windows"


def halves(record: Record) -> tuple[Perplexity, Perplexity]:
    """Perplexity on the calibration text's unseen windows, and on the other text."""
    losses, tokens = record.perplexity.window_losses, record.perplexity.tokens_per_window
    half = len(losses) // 2
    return Perplexity(losses[:half], tokens), Perplexity(losses[half:], tokens)


def row(record: Record) -> str:
    """A line of the table."""
    same, other = halves(record)
    return (
        f"| {record.cell.method} | {setting(record)} | {record.bits_per_weight:.2f} | {record.compression_ratio:.3f} | "
        f"{same.value:.2f} | {other.value:.2f} | {record.seconds.get('compress', 0):.0f} |"
    )


def table(records: Sequence[Record]) -> str:
    """All cells as a Markdown table."""
    head = (
        "| method | setting | true bits per weight | ratio (paper) | C4 | WikiText-2 | seconds |\n" + "|---" * 7 + "|"
    )
    return "\n".join([head, *map(row, records)])


def plot(records: Sequence[Record], path: Path) -> None:
    """Perplexity against true bits, one panel per text; only cells with most calibration windows."""
    import matplotlib.pyplot as plt

    most = max((record.cell.config.num_samples for record in records if record.cell.config), default=0)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for panel, part, title in zip(panels, (0, 1), ("C4, unseen windows", "WikiText-2"), strict=True):
        curves: dict[str, list[tuple[float, float]]] = {}
        for record in records:
            if (name := curve(record, most)) is not None:
                curves.setdefault(name, []).append((record.bits_per_weight, halves(record)[part].value))
        for name, points in sorted(curves.items()):
            if name == "dense":
                panel.axhline(points[0][1], color="black", linewidth=0.8, linestyle="--", label="dense, 16 bits")
            else:
                panel.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, linewidth=1, label=name)
        panel.set(title=title, xlabel="true bits per weight", ylabel="perplexity", xscale="log", yscale="log")
        panel.set_xticks([2.5, 3, 3.5, 4, 4.5, 6, 8.6], ["2.5", "3", "3.5", "4", "4.5", "6", "8.6"], minor=False)
        panel.set_xticks([], minor=True)
        panel.set_yticks([20, 25, 30, 40, 60, 100, 200, 300], ["20", "25", "30", "40", "60", "100", "200", "300"])
        panel.set_yticks([], minor=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=120)


def curve(record: Record, most: int) -> str | None:
    """Which line of the plot a cell is a point of, if any.

    Args:
        record: the cell.
        most: calibration windows of cells that are plotted; rounding uses none, so any number will do.
    """
    method, config = record.cell.method, record.cell.config
    if config is None:
        return method
    if (config.num_samples != most and method != "rtn") or config.pattern != "unstructured":
        return None
    if method == "slab+" and config.bits_per_weight is None:
        return "slab+ --ratio, 16-bit values"
    return f"{method} --refine" if config.refine else method


if __name__ == "__main__":
    typer.run(main)
