"""``slablm export``: a compressed model in the formats of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slablm.cli import options
from slablm.cli.console import Json, echo, next_step, print_json
from slablm.errors import SlabError


def export(
    source: Annotated[Path, typer.Argument(metavar="OUT", help="A slablm checkpoint folder.")],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to.")],
    format_: Annotated[str, typer.Option("--format", help="dense (safetensors) or gguf (for llama.cpp).")] = "dense",
    gguf_type: Annotated[str, typer.Option(help="Type of matrices in GGUF: f16 or q8_0.")] = "f16",
    max_shard_size: options.MaxShardSize = "50GB",
    overwrite: Annotated[bool, typer.Option(help="Replace what DIR already holds.")] = False,
    json: Json = False,
) -> None:
    """Write the approximated weights of OUT as dense ones, for tools that do not read slablm's format."""
    from slablm.dense.loading import quiet_libraries
    from slablm.system.memory import human_bytes, parse_bytes

    quiet_libraries()
    if format_ == "dense":
        from slablm.serving.export import export_dense

        size = parse_bytes(max_shard_size, "--max-shard-size")
        exported = export_dense(source, target, max_shard_size=size, overwrite=overwrite)
    elif format_ == "gguf":
        from slablm.serving.gguf_export import export_gguf

        exported = export_gguf(source, target, gguf_type, overwrite=overwrite)
    else:
        raise SlabError(f"--format must be dense or gguf, got {format_!r}")
    if json:
        print_json({"path": str(exported.path), "bytes": exported.bytes, "compressed_bytes": exported.compressed_bytes})
    else:
        echo(
            f"{exported.path}: {human_bytes(exported.bytes)} of dense weights "
            f"(in slablm's format they take {human_bytes(exported.compressed_bytes)})"
        )
        if format_ == "gguf":
            next_step("llama-cli", "-m", exported.path)
        else:
            next_step("slablm", "eval", exported.path)
