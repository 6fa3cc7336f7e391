"""``slablm compress``: a model in, a smaller checkpoint out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from slablm.cli.console import Device, Dtype, Json, Revision, TrustRemoteCode, log, print_json, progress
from slablm.cli.options import (
    BitsPerWeight,
    Calibration,
    GroupSize,
    IgnoredNames,
    Iterations,
    MagnitudeBits,
    MaxMemory,
    MaxShardSize,
    Method,
    NumSamples,
    PatternText,
    Rank,
    Ratio,
    SeqLen,
    TargetNames,
    ValueDtype,
)
from slablm.config import CompressionConfig


def compress(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file or 'smollm2'.")],
    out: Annotated[Path, typer.Argument(help="Folder for the compressed checkpoint.")],
    method: Method = "slab",
    ratio: Ratio = 0.5,
    bits_per_weight: BitsPerWeight = None,
    magnitude_bits: MagnitudeBits = None,
    group_size: GroupSize = 128,
    pattern: PatternText = "unstructured",
    rank: Rank = 1,
    iterations: Iterations = 20,
    calibration: Calibration = "c4",
    num_samples: NumSamples = 128,
    seq_len: SeqLen = 2048,
    targets: TargetNames = None,
    ignore: IgnoredNames = None,
    dtype: Dtype = "auto",
    value_dtype: ValueDtype = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that is sampled.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that OUT already holds.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run into OUT, if there is one.")] = False,
    max_memory: MaxMemory = None,
    max_shard_size: MaxShardSize = "50GB",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Compress MODEL into OUT in one shot, without retraining.

    One block at a time is read from the model's files, compressed and put aside beside OUT. After a kill, a power loss
    or a full disk, the same command with --resume goes on from there. Started by torchrun, several processes (one GPU
    each with --device cuda) compress one model together.
    """
    from slablm.distributed import join
    from slablm.memory import parse_bytes

    with join(device) as world:
        settings: dict[str, Any] = {"targets": tuple(targets)} if targets else {}
        config = CompressionConfig(
            method=method,
            ratio=ratio,
            bits_per_weight=bits_per_weight,
            magnitude_bits=magnitude_bits,
            group_size=group_size,
            pattern=pattern,
            rank=rank,
            iterations=iterations,
            calibration=calibration,
            num_samples=num_samples,
            seq_len=seq_len,
            ignore=tuple(ignore or ()),
            value_dtype=value_dtype,
            seed=seed,
            **settings,
        )
        result = run(
            model, out, config, overwrite=overwrite, resume=resume or world.restarted, dtype=dtype, device=device,
            revision=revision, trust_remote_code=trust_remote_code, world=world,
            max_shard_size=parse_bytes(max_shard_size, "--max-shard-size"),
            max_memory=None if max_memory is None else parse_bytes(max_memory, "--max-memory"),
        )  # fmt: skip
    if not world.first:
        return
    if json:
        print_json(result)
    else:
        _print_summary(result)


def run(source: str, out: Path, config: CompressionConfig, **options: Any) -> dict[str, Any]:
    """Compress into a folder with a progress bar; returns what ``--json`` prints (nothing on ranks other than 0).

    Args:
        source: the dense model.
        out: target folder.
        config: settings.
        options: fields of `slablm.runs.RunOptions`.

    Raises:
        SlabError: any bad input. Cheap checks come before the model is read.
    """
    from slablm.cli.console import quiet_libraries
    from slablm.inspection import inspect_folder
    from slablm.memory import peak_resident_bytes
    from slablm.runs import RunOptions, compress_folder

    start = time.perf_counter()
    quiet_libraries()
    run_options = RunOptions(**options)
    if not run_options.world.first:
        compress_folder(source, out, config, run_options)
        return {}
    with progress(f"Compressing ({config.method})") as (bar, task):
        result = compress_folder(
            source,
            out,
            config,
            run_options,
            lambda done, total, report: bar.update(task, completed=done, total=total),
            log.print,
        )
    inspection = inspect_folder(out)
    errors = [layer.output_error for layer in inspection.layers]
    return {
        "out": str(out),
        "method": config.method,
        "layers": len(errors),
        "bits_per_weight": inspection.bits_per_weight,
        "compression_ratio": inspection.compression_ratio,
        "output_error": sum(errors) / len(errors),
        "bytes_on_disk": inspection.file_bytes,
        "dense_bytes": result.dense_bytes,
        "resumed_blocks": result.resumed_blocks,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_resident_bytes(),
        "config": inspection.settings,
    }


def _print_summary(result: dict[str, Any]) -> None:
    from slablm.memory import human_bytes

    lines = {
        "written to": result["out"],
        "layers compressed": result["layers"],
        "true bits per weight": f"{result['bits_per_weight']:.3f}",
        "compression ratio (paper)": f"{result['compression_ratio']:.4f}",
        "mean relative output error": f"{result['output_error']:.4f}",
        "weights on disk": human_bytes(result["bytes_on_disk"]),
        "time": f"{result['seconds']:.1f} s",
    }
    if result["dense_bytes"]:
        lines["dense weights"] = human_bytes(result["dense_bytes"])
    if result["peak_memory_bytes"]:
        lines["peak memory"] = human_bytes(result["peak_memory_bytes"])
    for label, value in lines.items():
        typer.echo(f"{label:<28}{value}")
