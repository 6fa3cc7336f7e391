"""``slablm inspect``: check a compressed checkpoint and show its sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slablm.cli.console import Json, TextTable, console, next_step, next_try, print_json

if TYPE_CHECKING:
    from slablm.checkpoint.inspection import Inspection
    from slablm.checkpoint.layer_report import LayerReport


def inspect(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A slablm checkpoint folder.")], json: Json = False
) -> None:
    """Check the integrity of OUT and show what every layer costs."""
    from slablm.checkpoint.inspection import inspect_folder

    inspection = inspect_folder(out)
    if json:
        print_json(inspection.to_dict())
    else:
        _print_table(inspection)
        next_step("slablm", "eval", out)
        next_try(out)


def _of_all_experts(name: str) -> str:
    """A name that the experts of a block share: layers.0.experts.3.up_proj → layers.0.experts.*.up_proj."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join("*" if index in numbers[1:] else part for index, part in enumerate(parts))


def _print_table(inspection: Inspection) -> None:
    from rich.box import SIMPLE

    from slablm.checkpoint.layer_report import error_summary
    from slablm.methods.drift import mean_drift
    from slablm.system.memory import human_bytes

    table = TextTable(title="Compressed layers", box=SIMPLE)
    table.add_column("layer", no_wrap=True)
    for column in ("shape", "form", "bits", "ratio", "error", "unseen"):
        table.add_column(column, justify="right", no_wrap=True)
    groups: dict[tuple[str, tuple[int, int], str], list[LayerReport]] = {}
    for layer in inspection.layers:
        groups.setdefault((_of_all_experts(layer.name), layer.shape, layer.form), []).append(layer)
    for (name, (m, n), form), layers in groups.items():
        errors = error_summary(layers)
        unseen = errors["unseen_error"]
        table.add_row(
            layers[0].name if len(layers) == 1 else f"{name} ({len(layers)})",
            f"{m}×{n}",
            form,
            f"{layers[0].bits_per_weight:.3f}",
            f"{layers[0].compression_ratio:.4f}",
            f"{errors['output_error']:.4f}",
            "" if unseen is None else f"{unseen:.4f}",
        )
    shown = console()
    shown.print(table)
    shown.print("form: bits of a symbol, or share of kept entries; bits: true bits per weight; ratio: the paper's")
    shown.print("error: relative output error on calibration text; unseen: on text that calibrated nothing")
    if len(groups) < len(inspection.layers):
        shown.print("experts of one shape and form share a line, with their number and mean errors (--json has each)")
    if inspection.drift:
        last, mean = inspection.drift[-1], mean_drift(inspection.drift)
        shown.print(
            f"drift of hidden states from the dense model's, on unseen text: {last.rest:.4f} behind the last block, "
            f"{mean.rest:.4f} in the mean of all (first tokens of windows: {last.first:.4f}, {mean.first:.4f})"
        )
    shown.print(
        f"total: {len(inspection.layers)} layers, {inspection.weights / 1e6:.1f} M weights, "
        f"{inspection.bits_per_weight:.3f} true bits per weight ({inspection.model_bits_per_weight:.3f} in the whole "
        f"model of {inspection.model_weights / 1e6:.1f} M), "
        f"compression ratio {inspection.compression_ratio:.4f} (paper), {human_bytes(inspection.file_bytes)} on disk"
    )
    shown.print(f"head and embedding: {inspection.head_bits} bits")
    shown.print("integrity: every tensor matches its digest")
