"""Draws the figures of the documentation; `python docs/figures/draw.py` writes them beside this file.

`quality` and `speed` are of the measurements in experiments/. The others show what the library makes of one weight of
SmolLM2 (the query projection of block 10), with inputs from the built-in text: nothing in them is made up.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from slablm import CompressionConfig
from slablm.calibration.windows import calibration_windows
from slablm.comparison.plots import COLOURS, GREY, INK, STYLE, WIDTH
from slablm.comparison.records import Record
from slablm.comparison.table import pooled
from slablm.dense import loading
from slablm.methods import Decomposition, LayerStats, get_method
from slablm.methods.decomposition import low_rank
from slablm.methods.symbols import TILE_ROWS, SymbolWeight, level_values, signs

HERE = Path(__file__).parent
EXPERIMENTS = HERE.parents[1] / "experiments"
LAYER = "model.layers.10.self_attn.q_proj"
OURS, OTHERS = COLOURS[0][0], COLOURS[5][0]
# Headline windows come first in a record.
MODELS = {"SmolLM2-135M": "court-smollm2", "Gemma-3-270M": "court-gemma3"}
# Method, or for files what is in front of a type's name, and its name, colour and marker.
FAMILIES = {
    "slab+": ("slab+", OURS, "o"),
    "slab": ("SLaB 50 %", OURS, "s"),
    "llama.cpp": ("llama.cpp", INK[0], "^"),
    "awq": ("AWQ", GREY, "D"),
    "gptq": ("GPTQ", GREY, "v"),
    "rtn": ("rounding", GREY, "x"),
    "sparsegpt": ("SparseGPT 50 %", OTHERS, "P"),
    "wanda": ("Wanda 50 %", OTHERS, "X"),
}
SPEEDS = {
    "dense float32": "dense float32",
    "dense bfloat16": "dense bfloat16",
    "slab+": "slab+, 4 bits",
    "Q4_K_M": "llama.cpp Q4_K_M",
    "slab+ with a head of 8 bits": "slab+, 4 bits, --head-bits 8",
    "Q4_0": "llama.cpp Q4_0",
    "IQ4_NL": "llama.cpp IQ4_NL",
}


def main() -> None:
    """Draw all of them."""
    with mpl.rc_context(STYLE | {"font.size": 9, "axes.grid": False}):
        save(quality(), "quality")
        save(speed(), "speed")
        weight, stats = calibrated()
        save(parts(weight, stats), "slab-parts")
        save(rounds(weight, stats), "slab-rounds")
        config = CompressionConfig(bits_per_weight=4.1)
        symbols = get_method("slab+").function(weight, stats, config)
        assert isinstance(symbols, SymbolWeight)
        save(levels(weight, symbols), "levels")
        save(tile(symbols), "tile")


def save(figure: Figure, name: str) -> None:
    """Write one figure: white behind it, as pages are light or dark."""
    path = HERE / f"{name}.svg"
    figure.savefig(path, facecolor="white", metadata={"Date": None, "Creator": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()) + "\n", "utf-8")


def quality() -> Figure:
    """Perplexity above dense, in percent, against true bits: a point per row, a line between sizes of one method."""
    ticks = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    figure = Figure(figsize=(WIDTH, 3.6))
    for plot, (model, folder) in zip(figure.subplots(1, 2, sharey=True), MODELS.items(), strict=True):
        found = headline(EXPERIMENTS / folder / "results.jsonl")
        for family, (name, colour, marker) in FAMILIES.items():
            points = sorted(found.get(family, []))
            ours = colour == OURS
            plot.plot(
                [bits for bits, _ in points],
                [100 * (ratio - 1) for _, ratio in points],
                marker=marker,
                color=colour,
                label=name,
                linewidth=1.6 if ours else 0.8,
                markersize=6 if ours else 5,
                linestyle="-" if family != "llama.cpp" else "",
                zorder=3 if ours else 2,
            )
        plot.set_title(model, fontsize=9)
        plot.set_yscale("log")
        plot.set_yticks(ticks, [f"+{tick} %" for tick in ticks])
        plot.minorticks_off()
        plot.set_xlim(1.8, 9.4)
        plot.set_xlabel("true bits per weight")
        plot.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    figure.axes[0].set_ylabel("perplexity on WikiText-2, above dense")
    figure.axes[0].legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.63, 1.0))
    return figure


def headline(path: Path) -> dict[str, list[tuple[float, float]]]:
    """True bits per weight and perplexity over dense of every row, by family.

    Args:
        path: records of `slablm compare`; of two records of the same cell the later one counts, and draws are
            pooled as its tables do.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    latest = {record.cell: record for record in (Record.from_dict(json.loads(line)) for line in lines)}
    found: dict[str, list[tuple[float, float]]] = {}
    for record in pooled(list(latest.values())):
        config = record.cell.config
        if record.cell.dense or (config and (config.pattern != "unstructured" or config.ratio not in (None, 0.5))):
            continue
        family = "llama.cpp" if record.cell.rival else record.cell.method
        found.setdefault(family, []).append((record.bits_per_weight, record.ratio_to_dense))
    return found


def speed() -> Figure:
    """Tokens per second that SmolLM2 writes on two threads."""
    lines = (EXPERIMENTS / "token-path" / "smollm2.jsonl").read_text(encoding="utf-8").splitlines()
    runs = {run["run"]: run["median"] for line in lines if (run := json.loads(line))["threads"] == 2}
    medians = {label: runs[f"decode, {name}"] for name, label in SPEEDS.items()}
    order = sorted(medians, key=lambda name: medians[name], reverse=True)
    figure = Figure(figsize=(WIDTH, 0.7 + 0.24 * len(order)))
    plot = figure.subplots()
    plot.barh(order, [medians[name] for name in order], 0.7, color=[OURS if "slab" in n else GREY for n in order])
    for row, name in enumerate(order):
        plot.text(medians[name] + 1, row, f"{int(medians[name] + 0.5)}", va="center", fontsize=8)
    plot.set_xlabel("tokens per second, SmolLM2-135M, two threads")
    horizontal(plot)
    return figure


def horizontal(plot: Axes) -> None:
    """What bars that lie have in common: the first on top, no marks beside their names."""
    plot.invert_yaxis()
    plot.tick_params(axis="y", length=0)
    plot.margins(x=0.12, y=0.02)


def calibrated() -> tuple[Tensor, LayerStats]:
    """The layer's weight, [576, 576], and the statistics of its inputs on 16 windows of 512 tokens."""
    model, tokenizer = loading.load("smollm2")
    config = CompressionConfig(calibration="builtin", num_samples=16, seq_len=512)
    layer = model.get_submodule(LAYER)
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        for window in calibration_windows(model, tokenizer, config):
            model(window[None])
    handle.remove()
    inputs, kept_back = torch.cat(seen[:-2]), torch.cat(seen[-2:])
    norms, gram = inputs.norm(dim=0), inputs.T @ inputs
    stats = LayerStats(norms, len(inputs), inputs, gram, kept_back.T @ kept_back, kept_back)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach(), stats


def parts(weight: Tensor, stats: LayerStats) -> Figure:
    """A corner of W beside its three parts: kept entries, magnitudes of rank 1, and signs."""
    found = get_method("slab").function(weight, stats, CompressionConfig(method="slab"))
    assert isinstance(found, Decomposition)
    assert found.signs is not None
    kept = torch.zeros_like(weight).masked_scatter_(found.mask, found.values.float())
    shown = {
        "$W$": weight,
        "$W_S$": kept,
        "$W_L$": low_rank(found.left, found.right),
        "$W_B$": 1 - 2 * found.signs.float(),
    }
    corner = 32
    figure = Figure(figsize=(WIDTH, 1.7))
    axes = figure.subplots(1, 4)
    limit = weight[:corner, :corner].abs().quantile(0.99).item()
    for plot, (name, matrix), between in zip(axes, shown.items(), ("≈", "+", "⊙", ""), strict=True):
        plot.imshow(
            matrix[:corner, :corner].float().numpy(),
            cmap="gray" if name == "$W_B$" else "RdBu_r",
            vmin=-1 if name == "$W_B$" else -limit,
            vmax=1 if name == "$W_B$" else limit,
            interpolation="nearest",
        )
        plot.set_title(name, fontsize=11)
        plot.set_axis_off()
        plot.text(1.12, 0.5, between, transform=plot.transAxes, ha="center", va="center", fontsize=14)
    return figure


def rounds(weight: Tensor, stats: LayerStats) -> Figure:
    """The output error of SLaB over its rounds, beside that of Wanda."""
    figure = Figure(figsize=(WIDTH, 2.2))
    plot = figure.subplots()
    steps = range(1, 21)
    for method, colour, style in (("slab", OURS, "-"), ("wanda", INK[0], "--")):
        errors = []
        for step in steps:
            config = CompressionConfig(method=method, iterations=step)
            errors.append(stats.output_error(weight, get_method(method).function(weight, stats, config).dense()))
        plot.plot(steps, errors, style, color=colour, label={"slab": "SLaB", "wanda": "Wanda"}[method])
    plot.set_ylim(bottom=0)
    plot.set_xticks((1, 5, 10, 15, 20))
    plot.set_xlabel("rounds of alternating minimisation")
    plot.set_ylabel("relative output error")
    plot.legend()
    return figure


def levels(weight: Tensor, symbols: SymbolWeight) -> Figure:
    """How entries over their row's scale are distributed, and the levels that either sign offers."""
    assert symbols.rotation is not None  # the documentation says so
    entries = (symbols.rotation.rotate(weight) / symbols.scales.float()[:, None]).flatten()
    values = level_values(symbols.levels)
    figure = Figure(figsize=(WIDTH, 2.4))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    limit = 1.25 * values.abs().max().item()
    upper.hist(entries.numpy(), 81, range=(-limit, limit), color=GREY)
    upper.set_yticks([])
    upper.set_ylabel("entries")
    for row, sign in ((1, 1.0), (0, -1.0)):
        for parity, face in ((0, OURS), (1, "white")):
            lower.plot(sign * values[parity::2], [row] * len(values[parity::2]), "o", color=OURS, mfc=face, ms=5)
    lower.set_yticks((1, 0), ("above even: $a_c$", "above odd: $-a_c$"))
    lower.set_ylim(-0.6, 1.6)
    lower.set_xlabel("entry over the scale of its row (filled: c is even)")
    return figure


def tile(symbols: SymbolWeight) -> Figure:
    """Symbols of one tile and ten columns; coloured where the symbol above is odd, so that the sign is −."""
    columns = 10
    codes = symbols.codes[:TILE_ROWS, :columns]
    turned = signs(symbols.codes[:TILE_ROWS])[:, :columns] < 0
    figure = Figure(figsize=(WIDTH, 1.9))
    plot = figure.subplots()
    plot.imshow(turned.float().numpy(), cmap=mpl.colors.ListedColormap(["white", "#cfe4f3"]), vmin=0, vmax=1)
    for row in range(TILE_ROWS):
        for column in range(columns):
            sign = "−" if turned[row, column] else "+"
            plot.text(column, row, f"{sign}a[{codes[row, column]}]", ha="center", va="center", fontsize=7.5)
    plot.set_xticks([x - 0.5 for x in range(1, columns)], minor=True)
    plot.set_yticks([y - 0.5 for y in range(1, TILE_ROWS)], minor=True)
    plot.grid(which="minor", color=GREY, linewidth=0.5)
    plot.set_xticks([])
    plot.set_yticks(range(TILE_ROWS), [f"row {row}" for row in range(1, TILE_ROWS + 1)])
    plot.tick_params(which="both", length=0)
    return figure


if __name__ == "__main__":
    main()
