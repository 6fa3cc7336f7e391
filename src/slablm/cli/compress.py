"""``slablm compress``: a model in, a smaller checkpoint out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slablm.cli.console import Device, Dtype, Json, Revision, TrustRemoteCode, log, print_json, progress
from slablm.config import CompressionConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from slablm.layerwise import LayerReport
    from slablm.targets import Targets


def compress(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file or 'smollm2'.")],
    out: Annotated[Path, typer.Argument(help="Folder for the compressed checkpoint.")],
    method: Annotated[str, typer.Option(help="slab, wanda, magnitude or an arm of the ablation.")] = "slab",
    ratio: Annotated[float, typer.Option(help="Compression ratio in the paper's accounting.")] = 0.5,
    pattern: Annotated[str, typer.Option(help="unstructured, 2:4, 4:8 or any N:M (N of every M survive).")] = (
        "unstructured"
    ),
    rank: Annotated[int, typer.Option(help="Rank of the low-rank part.")] = 1,
    iterations: Annotated[int, typer.Option(help="Rounds of alternating minimisation.")] = 20,
    calibration: Annotated[str, typer.Option(help="c4, wikitext2, self, builtin or a text file.")] = "c4",
    num_samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    targets: Annotated[list[str] | None, typer.Option(help="Modules to compress; repeat for several.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Modules to leave dense; repeat for several.")] = None,
    dtype: Dtype = "auto",
    value_dtype: Annotated[str | None, typer.Option(help="Stored values: float16 or bfloat16.")] = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that is sampled.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that OUT already holds.")] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Compress MODEL into OUT in one shot, without retraining."""
    settings: dict[str, Any] = {"targets": tuple(targets)} if targets else {}
    config = CompressionConfig(
        method=method,
        ratio=ratio,
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
        model, out, config, overwrite=overwrite, dtype=dtype, device=device, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if json:
        print_json(result)
    else:
        _print_summary(result)


def run(source: str, out: Path, config: CompressionConfig, *, overwrite: bool, **load_options: Any) -> dict[str, Any]:
    """Check, load, compress, save; returns what ``--json`` prints.

    Raises:
        SlabError: any bad input. Cheap checks come before the model is loaded.
    """
    from slablm import __version__, loading
    from slablm.api import check_model, check_packable
    from slablm.calibration.text import calibration_windows
    from slablm.card import model_card
    from slablm.checkpoint import check_target, save
    from slablm.cli.console import quiet_libraries
    from slablm.errors import SlabError
    from slablm.inspection import inspect_folder
    from slablm.memory import human_bytes, peak_resident_bytes
    from slablm.targets import select_targets

    start = time.perf_counter()
    check_packable(config.method)
    check_target(out, overwrite)
    if loading.is_compressed(source):
        raise SlabError(f"{source} is already compressed by slablm: start from the dense model")
    quiet_libraries()
    log.print(f"Loading {source}")
    model, tokenizer = loading.load(source, **load_options)
    check_model(model)
    targets = select_targets(model, config)
    for name, reason in targets.left_dense.items():
        log.print(f"left dense: {name} ({reason})")
    log.print(f"Calibrating on {config.calibration}: {config.num_samples} windows of {config.seq_len} tokens")
    windows = calibration_windows(model, tokenizer, config)
    hidden_bytes = windows.numel() * model.config.get_text_config().hidden_size * model.dtype.itemsize
    log.print(f"Memory for hidden states of all windows: {human_bytes(hidden_bytes)}")
    dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    reports = _compress_with_progress(model, targets, windows, config)
    config = model.config.quantization_config.compression  # with the value type filled in
    card = model_card(source, config, reports, targets.left_dense, __version__)
    save(model, tokenizer, out, card=card, overwrite=overwrite)
    inspection = inspect_folder(out)
    return {
        "out": str(out),
        "method": config.method,
        "layers": len(reports),
        "bits_per_weight": inspection.bits_per_weight,
        "compression_ratio": inspection.compression_ratio,
        "output_error": sum(report.output_error for report in reports) / len(reports),
        "bytes_on_disk": inspection.file_bytes,
        "dense_bytes_in_memory": dense_bytes,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_resident_bytes(),
        "config": config.to_dict(),
    }


def _compress_with_progress(
    model: PreTrainedModel, targets: Targets, windows: Tensor, config: CompressionConfig
) -> list[LayerReport]:
    from slablm.api import compress_model

    with progress(f"Compressing ({config.method})") as (bar, task):
        return compress_model(
            model,
            targets,
            windows,
            config,
            lambda done, total, report: bar.update(task, completed=done, total=total),
        )


def _print_summary(result: dict[str, Any]) -> None:
    from slablm.memory import human_bytes

    lines = {
        "written to": result["out"],
        "layers compressed": result["layers"],
        "true bits per weight": f"{result['bits_per_weight']:.3f}",
        "compression ratio (paper)": f"{result['compression_ratio']:.4f}",
        "mean relative output error": f"{result['output_error']:.4f}",
        "weights on disk": human_bytes(result["bytes_on_disk"]),
        "dense weights in memory": human_bytes(result["dense_bytes_in_memory"]),
        "time": f"{result['seconds']:.1f} s",
    }
    if result["peak_memory_bytes"]:
        lines["peak memory"] = human_bytes(result["peak_memory_bytes"])
    for label, value in lines.items():
        typer.echo(f"{label:<28}{value}")
