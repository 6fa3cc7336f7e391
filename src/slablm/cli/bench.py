"""``slablm bench``: speed and memory of a model, beside the dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slablm.cli import options
from slablm.cli.console import (
    Dtype,
    Json,
    Revision,
    TrustRemoteCode,
    echo,
    next_step,
    print_json,
    print_table,
    progress,
    say,
)
from slablm.errors import SlabError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slablm.evaluation.contender import Contender, Footprint
    from slablm.evaluation.llama_bench import LlamaBench
    from slablm.evaluation.speed import Program, Samples, Speed, Workload

MODEL = "model"
REFERENCE = "dense float32"
DENSE_TYPES = ("float32", "bfloat16")
ENERGY_NOTE = "of the document case, or else of the prompt and the new tokens: all that ran on the CPU packages (RAPL)"
QUANTITIES = {
    "prefill": "prefill\ntokens/s",
    "first_token": "first token\ns",
    "decode": "decode\ntokens/s",
    "document": "document\ns",
    "energy": "energy\nJ",
}


def bench(
    model: options.Model,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="The dense model, to run beside it in fp32 and bf16; or a GGUF file, which llama.cpp's "
            "llama-bench runs in the same rounds. Repeat for several."
        ),
    ] = None,
    llama_bench: Annotated[str, typer.Option(help="llama.cpp's benchmark, for GGUF files.")] = "llama-bench",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens to read.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 32,
    rounds: Annotated[int, typer.Option(help="Measured runs of each contender.")] = 5,
    document: Annotated[
        bool, typer.Option("--document", help="Also read a 512-token document and write a 128-token summary.")
    ] = False,
    threads: Annotated[str, typer.Option(help="Thread counts, separated by commas; 'all' is torch's own.")] = "1,all",
    value_bits: Annotated[int, typer.Option(help="8: also run the compressed model with 8-bit values.")] = 16,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Measure prefill, decode, time to first token and memory of MODEL on the CPU."""
    from slablm.dense.loading import quiet_libraries
    from slablm.evaluation.energy import RaplMeter, find_meter
    from slablm.evaluation.speed import Workload, measure_speed, weight_bytes
    from slablm.runtime import kernels

    workload = Workload(prompt_tokens, new_tokens, document)
    counts = _thread_counts(threads)
    if rounds < 1:
        raise SlabError(f"--rounds must be 1 or more, got {rounds}")
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    dense, files = _rivals(against or [], llama_bench)
    contenders = _contenders(model, dense, dtype, value_bits, options)
    meter = find_meter()
    energy = meter if isinstance(meter, str) else ENERGY_NOTE
    quiet_libraries()
    measured: dict[str, Contender | LlamaBench] = {**{c.name: c for c in contenders}, **files}
    footprints = _footprints(measured, workload)
    say("Loading all contenders")
    models = {contender.name: contender.load() for contender in contenders}
    runners: dict[str, PreTrainedModel | Program] = {**models, **files}
    with progress("Measuring speed, in turns") as step:
        speeds = measure_speed(
            runners,
            workload,
            rounds,
            counts,
            meter=meter if isinstance(meter, RaplMeter) else None,
            on_run=step,
        )
    weights = {name: weight_bytes(loaded) for name, loaded in models.items()}
    weights |= {name: file.weight_bytes() for name, file in files.items()}
    conditions = {
        **asdict(workload),
        "rounds": rounds,
        "dtype": str(models[MODEL].dtype).removeprefix("torch."),
        "cpu_kernels": kernels.backend().name,
    }
    if json:
        print_json(conditions | _json(speeds, weights, footprints, energy))
        return
    _print_speeds(speeds)
    _print_memory(weights, footprints)
    echo(
        f"{prompt_tokens} prompt tokens, {new_tokens} new tokens, {rounds} rounds; "
        f"{MODEL} in {conditions['dtype']}, CPU kernels {conditions['cpu_kernels']}"
    )
    echo(f"energy {energy}")
    next_step("slablm", "serve", model)


def _contenders(
    model: str, against: Sequence[str], dtype: str, value_bits: int, options: dict[str, Any]
) -> list[Contender]:
    from slablm.dense import loading
    from slablm.evaluation.contender import Contender

    if value_bits not in (8, 16):
        raise SlabError(f"--value-bits must be 8 or 16, got {value_bits}")
    for source in filter(loading.is_compressed, against):
        raise SlabError(f"{source} is compressed by slablm: --against takes the dense model, or a GGUF file")
    if len(against) > 1:
        raise SlabError(f"--against takes one dense model and any number of GGUF files, got {' and '.join(against)}")
    contenders = [Contender(MODEL, model, dtype, options=options)]
    if value_bits == 8:
        contenders.append(Contender(f"{MODEL}, 8-bit values", model, dtype, 8, options))
    # A revision names a state of MODEL's repository, not of another one.
    others = options | {"revision": None}
    contenders += [Contender(f"dense {k}", source, k, options=others) for source in against for k in DENSE_TYPES]
    return contenders


def _rivals(against: Sequence[str], program: str) -> tuple[list[str], dict[str, LlamaBench]]:
    """What --against names: dense models, and GGUF files by the name of the file."""
    from pathlib import Path

    from slablm.evaluation.llama_bench import LlamaBench

    dense, files = [], {}
    for source in against:
        if not source.lower().endswith(".gguf"):
            dense.append(source)
            continue
        if not Path(source).is_file():
            raise SlabError(f"--against {source}: there is no such file")
        name = f"llama.cpp {Path(source).stem}"
        if name in files:
            raise SlabError(f"--against: two files are called {Path(source).name}; rename one")
        files[name] = LlamaBench(source, program)
        files[name].check()
    return dense, files


def _thread_counts(text: str) -> list[int]:
    import torch

    counts = []
    for part in (part.strip() for part in text.split(",")):
        if part != "all" and not (part.isdecimal() and int(part) > 0):
            raise SlabError(f"--threads takes counts of 1 or more or 'all', separated by commas, got {text!r}")
        counts.append(torch.get_num_threads() if part == "all" else int(part))
    return list(dict.fromkeys(counts))


def _footprints(contenders: Mapping[str, Contender | LlamaBench], workload: Workload) -> dict[str, Footprint]:
    """Before anything is loaded here, so that the two do not compete for memory."""
    footprints = {}
    with progress("Measuring memory, one process each") as step:
        for name, contender in contenders.items():
            footprints[name] = contender.footprint(workload.prompt_tokens)
            step(len(footprints), len(contenders))
    return footprints


def _json(
    speeds: Sequence[Speed], weights: dict[str, int], footprints: dict[str, Footprint], energy: str
) -> dict[str, Any]:
    """What was measured, ready for JSON."""
    return {
        "speed": [
            {
                "contender": speed.contender,
                "threads": speed.threads,
                **{
                    name: _summary(samples, getattr(_reference(speed, speeds), name, None))
                    for name, samples in _measured(speed)
                },
            }
            for speed in speeds
        ],
        "memory": [
            {"contender": name, "weight_bytes": weights[name], **_footprint_bytes(found)}
            for name, found in footprints.items()
        ],
        "energy_note": energy,
    }


def _footprint_bytes(found: Footprint) -> dict[str, int | None]:
    return {"before_bytes": found.before, "resident_bytes": found.resident, "peak_bytes": found.peak}


def _measured(speed: Speed) -> list[tuple[str, Samples]]:
    return [(name, getattr(speed, name)) for name in QUANTITIES if getattr(speed, name) is not None]


def _reference(speed: Speed, speeds: Sequence[Speed]) -> Speed | None:
    """The dense model in fp32 with as many threads."""
    return next((s for s in speeds if s.contender == REFERENCE and s.threads == speed.threads), None)


def _summary(samples: Samples, reference: Samples | None) -> dict[str, float | None]:
    return {
        "median": samples.median,
        "interquartile_range": samples.spread,
        "ratio_to_dense_float32": None if reference is None else samples.ratio_to(reference),
    }


def _print_speeds(speeds: Sequence[Speed]) -> None:
    names = [name for name, _ in _measured(speeds[0])] + ([] if speeds[0].energy else ["energy"])
    columns = [QUANTITIES[name] for name in names]
    body = []
    for speed in speeds:
        reference = _reference(speed, speeds)
        cells = [_cell(getattr(speed, name), getattr(reference, name, None), name) for name in names]
        body.append((str(speed.threads), speed.contender, *cells))
    title = "Speed: median ± interquartile range"
    if _reference(speeds[0], speeds):
        title += f" (× {REFERENCE})"
    print_table(title, ("threads", "contender", *columns), body)


def _cell(samples: Samples | None, reference: Samples | None, quantity: str) -> str:
    if samples is None:
        return "not measurable here" if quantity == "energy" else "not measured"
    cell = f"{samples.median:.3g}" if samples.median < 100 else f"{samples.median:.0f}"
    if samples.spread is not None:
        cell += f" ± {samples.spread:.2g}" if samples.spread < 100 else f" ± {samples.spread:.0f}"
    return cell if reference is None else f"{cell} ({samples.ratio_to(reference):.2f}×)"


def _print_memory(weights: dict[str, int], footprints: dict[str, Footprint]) -> None:
    from slablm.system.memory import human_bytes

    base = weights.get(REFERENCE)
    body = []
    for name, found in footprints.items():
        weight = human_bytes(weights[name]) + ("" if base is None else f" ({weights[name] / base:.2f}×)")
        others = (found.resident, found.peak, found.before)
        sizes = ("unknown" if count is None else human_bytes(count) for count in others)
        body.append(("", name, weight, *sizes))
    columns = ("", "contender", "weights", "resident", "peak", "before loading")
    print_table("Memory", columns, body)
