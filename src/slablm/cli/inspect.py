"""``slablm inspect``: check a compressed checkpoint and show its sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slablm.cli.console import Json, TextTable, console, print_json

if TYPE_CHECKING:
    from slablm.checkpoint.inspection import Inspection


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


def _print_table(inspection: Inspection) -> None:
    from rich.box import SIMPLE

    from slablm.methods.drift import mean_drift
    from slablm.system.memory import human_bytes

    table = TextTable(title="Compressed layers", box=SIMPLE)
    table.add_column("layer", no_wrap=True)
    for column in ("shape", "form", "bits", "ratio", "error", "unseen"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in inspection.layers:
        table.add_row(
            layer.name,
            f"{layer.shape[0]}×{layer.shape[1]}",
            layer.form,
            f"{layer.bits_per_weight:.3f}",
            f"{layer.compression_ratio:.4f}",
            f"{layer.output_error:.4f}",
            "" if layer.unseen_error is None else f"{layer.unseen_error:.4f}",
        )
    shown = console()
    shown.print(table)
    shown.print("form: bits of a symbol, or share of kept entries; bits: true bits per weight; ratio: the paper's")
    shown.print("error: relative output error on calibration text; unseen: on text that calibrated nothing")
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
