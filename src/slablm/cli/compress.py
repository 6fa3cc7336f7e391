"""``slablm compress``: a model in, a smaller checkpoint out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slablm.cli import options
from slablm.cli.console import Json, echo, next_step, next_try, print_json, progress, say, say_if_quantized
from slablm.errors import SlabError

if TYPE_CHECKING:
    from slablm.compression.options import RunOptions
    from slablm.config import CompressionConfig


@options.spread
def compress(
    context: typer.Context,
    model: options.Dense,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the compressed checkpoint.")],
    *,
    settings: options.Settings,
    seed: options.Seed = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model, or its files, that OUT already holds.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished run into OUT, if there is one.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload the result under this name, as `slablm push` does.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to-hub: only you can see it there.")] = False,
    source: options.Source,
    json: Json = False,
) -> None:
    """Compress MODEL into OUT in one shot, without retraining.

    One block at a time is read from the model's files, compressed and put aside beside OUT. After a kill, a power loss
    or a full disk, the same command with --resume goes on from there. Started by torchrun, several processes (one GPU
    each with --device cuda) compress one model together.
    """
    from slablm.system.distributed import join

    if private and push_to_hub is None:
        raise SlabError("--private is for --push-to-hub USER/NAME: add it, or leave --private out")
    with join(settings.device) as world:
        config = options.config(context)
        if world.first:
            _say_quick(settings, config)
            if push_to_hub is not None:  # before hours of work
                from slablm.serving.hub import check_repository

                check_repository(push_to_hub, private=private)
        chosen = options.run_options(
            settings, source, overwrite=overwrite, resume=resume or world.restarted, world=world
        )
        result = run(model, out, config, chosen)
    if not world.first:
        return
    if push_to_hub is not None:
        from slablm.serving.hub import push

        result["url"] = push(out, push_to_hub, private=private, say=say)
    if json:
        print_json(result)
    else:
        _print_summary(result)
        next_step("slablm", "inspect", out)
        next_try(out)


def _say_quick(settings: options.Settings, config: CompressionConfig) -> None:
    """What --quick has chosen, and what it gives up."""
    if settings.quick:
        usual = options.Settings()
        say(
            f"--quick: {config.num_samples} windows of {config.seq_len} tokens of {config.calibration} text. For the "
            f"best quality leave it out: the default is {usual.num_samples} windows of {usual.seq_len} tokens of "
            f"{usual.calibration}, from the hub, and takes much longer"
        )


def run(source: str, out: Path, config: CompressionConfig, run_options: RunOptions) -> dict[str, Any]:
    """Compress into a folder with a progress bar; returns what ``--json`` prints (nothing on ranks other than 0).

    Args:
        source: the dense model.
        out: target folder.
        config: settings.
        run_options: everything else.

    Raises:
        SlabError: any bad input. Cheap checks come before the model is read.
    """
    from slablm.api import compress_folder
    from slablm.checkpoint.inspection import inspect_folder
    from slablm.checkpoint.layer_report import drift_summary, error_summary
    from slablm.dense.loading import quiet_libraries
    from slablm.system.memory import peak_resident_bytes

    start = time.perf_counter()
    quiet_libraries()
    if not run_options.world.first:
        compress_folder(source, out, config, run_options)
        return {}
    say_if_quantized(source)
    with progress(f"Compressing ({config.method})") as step:

        def told(line: str) -> None:
            say(line)
            if not line.startswith("Reading"):  # then the hub shows how far it is
                step(0, 0)

        result = compress_folder(source, out, config, run_options, step, told)
    inspection = inspect_folder(out)
    return {
        "out": str(out),
        "method": config.method,
        "layers": len(inspection.layers),
        "bits_per_weight": inspection.bits_per_weight,
        "model_bits_per_weight": inspection.model_bits_per_weight,
        "compression_ratio": inspection.compression_ratio,
        **error_summary(inspection.layers),
        "drift": drift_summary(inspection.drift),
        "head_bits": inspection.head_bits,
        "bytes_on_disk": inspection.file_bytes,
        "dense_bytes": result.dense_bytes,
        "resumed_blocks": result.resumed_blocks,
        "rarely_chosen": result.rarely_chosen,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_resident_bytes(),
        "config": inspection.settings,
    }


def _print_summary(result: dict[str, Any]) -> None:
    from slablm.system.memory import human_bytes

    lines = {
        "written to": result["out"],
        **({"on the hub": result["url"]} if "url" in result else {}),
        "layers compressed": result["layers"],
        "true bits per weight": f"{result['bits_per_weight']:.3f}",
        "of the whole model": f"{result['model_bits_per_weight']:.3f}",
        "compression ratio (paper)": f"{result['compression_ratio']:.4f}",
        "mean relative output error": _errors(result),
        "head and embedding": f"{result['head_bits']} bits",
        "weights on disk": human_bytes(result["bytes_on_disk"]),
        "time": f"{result['seconds']:.1f} s",
    }
    if result["drift"]:
        lines["drift on unseen text"] = f"{result['drift']['last']['rest']:.4f} behind the last block"
    if result["dense_bytes"]:
        lines["dense weights"] = human_bytes(result["dense_bytes"])
    if result["peak_memory_bytes"]:
        lines["peak memory"] = human_bytes(result["peak_memory_bytes"])
    for label, value in lines.items():
        echo(f"{label:<28}{value}")


def _errors(result: dict[str, Any]) -> str:
    on_calibration = f"{result['output_error']:.4f} on calibration text"
    unseen = result["unseen_error"]
    return on_calibration if unseen is None else f"{on_calibration}, {unseen:.4f} on unseen text"
