"""Arguments and options that verbs share, and the settings made from them.

Options that several verbs have in a row are the fields of a dataclass; `spread` gives a verb one option for each.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from slablm.cli.console import Device, Dtype, Revision, TrustRemoteCode
from slablm.config import CALIBRATION_SOURCES, CompressionConfig

if TYPE_CHECKING:
    from slablm.compression.options import RunOptions

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, local folder (dense or compressed), .gguf file or 'smollm2'.")
]
Dense = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, .gguf file or 'smollm2'.")]
# Here, as reading them from the table of methods would load torch for a help text.
METHODS = ("slab+", "slab", "wanda", "magnitude", "sparse", "sparse+lowrank", "sparse+scalar-binary")
# The defaults of --quick.
QUICK = {"calibration": "builtin", "num_samples": 16, "seq_len": 256}


def one_of(values: Sequence[str]) -> Callable[[], list[str]]:
    """What a shell is told that a word can be."""
    return lambda: list(values)


Method = Annotated[
    str,
    typer.Option(
        help="slab+ (a trellis code), slab (exactly the paper's), the pruners wanda and magnitude, or an arm of the "
        "paper's ablation: sparse, sparse+lowrank, sparse+scalar-binary.",
        autocompletion=one_of(METHODS),
    ),
]
Ratio = Annotated[
    float | None, typer.Option(help="Compression ratio in the paper's accounting; not of slab+. (default: 0.5)")
]
BitsPerWeight = Annotated[
    float | None, typer.Option(help="True bits per weight of slab+, the most that a block has. (default: 4)")
]
PatternText = Annotated[str, typer.Option(help="unstructured, 2:4, 4:8 or any N:M (N of every M survive).")]
Rank = Annotated[int, typer.Option(help="Rank of the low-rank part.")]
Iterations = Annotated[int, typer.Option(help="Rounds of alternating minimisation.")]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help=f"Calibrate on {QUICK['num_samples']} windows of {QUICK['seq_len']} tokens of builtin text, unless told "
        "otherwise: minutes and no hub, at the price of quality.",
    ),
]
Calibration = Annotated[
    str,
    typer.Option(
        help="c4, wikitext2 (from the hub), builtin (Python's documentation), self (the model writes it), a text file, "
        "or chat:FILE.jsonl; TEXT@0-99: of its windows only those.",
        autocompletion=one_of(CALIBRATION_SOURCES),
    ),
]
EvaluationText = Annotated[
    str,
    typer.Option(help="wikitext2, c4, builtin, a text file, or chat:FILE.jsonl; TEXT@0-99: of its windows only those."),
]
NumSamples = Annotated[int, typer.Option(help="Calibration windows.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per window.")]
Bos = Annotated[
    bool,
    typer.Option(help="Begin each window with a BOS token if the tokenizer begins texts with one; papers do not."),
]
TargetNames = Annotated[list[str] | None, typer.Option("--targets", help="Modules to compress; repeat for several.")]
IgnoredNames = Annotated[list[str] | None, typer.Option("--ignore", help="Modules to leave dense; repeat for several.")]
ValueDtype = Annotated[str | None, typer.Option(help="Stored values: float16 or bfloat16.")]
HeadBits = Annotated[
    int, typer.Option(help="Bits of a weight of embedding and head: 16, or 8 (int8, a scale per row).")
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is sampled.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; above it, tokens are drawn.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this much probability together.")]
WritingSeed = Annotated[int | None, typer.Option(help="Seed of the draws. (default: another one each time)")]
Stop = Annotated[list[str] | None, typer.Option(help="End the text in front of this word; repeat for several.")]
KvCache = Annotated[
    str | None,
    typer.Option(
        help="Keep keys and values quantised: fp8, or quanto or hqq (4 bits; with that package). Less memory for long "
        "texts, slower. (default: as they are)",
        autocompletion=one_of(("fp8", "quanto", "hqq")),
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for calibration activations (of each rank), such as 4GB; more of them go to a file beside OUT."
    ),
]
MostlyDense = Annotated[
    bool, typer.Option("--mostly-dense", help="Go on where less than half of the blocks' weights can be compressed.")
]
MaxShardSize = Annotated[str, typer.Option(help="Largest file of weights in OUT, such as 5GB.")]


@dataclass(frozen=True)
class Settings:
    """What a compression is like, as it is typed.

    The fields are called like those of `CompressionConfig`; `quick` stands for other defaults of some of them.
    """

    method: Method = "slab+"
    ratio: Ratio = None
    bits_per_weight: BitsPerWeight = None
    pattern: PatternText = "unstructured"
    rank: Rank = 1
    iterations: Iterations = 20
    quick: Quick = False
    calibration: Calibration = "c4"
    num_samples: NumSamples = 128
    seq_len: SeqLen = 2048
    bos: Bos = True
    targets: TargetNames = None
    ignore: IgnoredNames = None
    dtype: Dtype = "auto"
    value_dtype: ValueDtype = None
    head_bits: HeadBits = 16
    device: Device = "cpu"


@dataclass(frozen=True)
class Source:
    """Where the model comes from, and what the run may take, as it is typed."""

    max_memory: MaxMemory = None
    max_shard_size: MaxShardSize = "50GB"
    mostly_dense: MostlyDense = False
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False


# The headings of the help text of verbs with many options.
PANELS = {
    "Size": ("method", "bits_per_weight", "ratio", "pattern", "rank", "iterations", "value_dtype", "head_bits",
             "targets", "ignore", "mostly_dense"),
    "Calibration": ("quick", "calibration", "num_samples", "seq_len", "bos", "seed"),
    "Memory and speed": ("dtype", "device", "max_memory"),
    "Output": ("overwrite", "resume", "max_shard_size", "push_to_hub", "private", "json"),
    "Model on the hub": ("revision", "trust_remote_code"),
}  # fmt: skip


def spread(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn every parameter of a verb that is one of the dataclasses above into an option for each of its fields.

    typer reads the options of a verb from its signature; this is the signature with the fields in the place of the
    dataclass, each under its heading in the help text. The verb itself is given the dataclass.
    """
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        if not is_dataclass(hints[name]):
            parameters.append(parameter.replace(annotation=_under_heading(name, hints[name])))
            continue
        groups[name] = hints[name]
        types = get_type_hints(hints[name], include_extras=True)
        for field in fields(hints[name]):
            kind = inspect.Parameter.KEYWORD_ONLY
            annotation = _under_heading(field.name, types[field.name])
            parameters.append(inspect.Parameter(field.name, kind, default=field.default, annotation=annotation))

    @functools.wraps(verb)
    def command(**typed: Any) -> None:
        for name, group in groups.items():
            typed[name] = group(**{field.name: typed.pop(field.name) for field in fields(group)})
        verb(**typed)

    vars(command)["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _under_heading(name: str, annotation: Any) -> Any:
    """An option's annotation with its heading in the help text."""
    heading = next((heading for heading, names in PANELS.items() if name in names), None)
    if heading is None or get_origin(annotation) is not Annotated:
        return annotation
    kind, *rest = get_args(annotation)
    options = [copy.copy(part) for part in rest if isinstance(part, OptionInfo)]
    for option in options:
        option.rich_help_panel = heading
    return Annotated[(kind, *options)]


def typed(context: typer.Context, name: str) -> bool:
    """Whether an option was given, and is not the default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def run_options(settings: Settings, source: Source, **others: Any) -> RunOptions:
    """The options of a run that a verb was given.

    Args:
        settings: as typed.
        source: as typed.
        others: further fields of `RunOptions`.

    Raises:
        SlabError: a size is none.
    """
    from slablm.compression.options import RunOptions
    from slablm.system.memory import parse_bytes

    return RunOptions(
        dtype=settings.dtype,
        device=settings.device,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        max_memory=None if source.max_memory is None else parse_bytes(source.max_memory, "--max-memory"),
        max_shard_size=parse_bytes(source.max_shard_size, "--max-shard-size"),
        mostly_dense=source.mostly_dense,
        **others,
    )


def config(context: typer.Context, *names: str) -> CompressionConfig:
    """The settings that a verb was given; what was left open is the default, or that of --quick.

    Args:
        context: the verb's; its options are called like the settings.
        names: which settings; by default all that the verb has options for.

    Raises:
        SlabError: a setting is out of range.
    """
    names = names or tuple(field.name for field in fields(CompressionConfig) if field.name in context.params)
    given = {name: context.params[name] for name in names}
    if context.params.get("quick"):
        given |= {name: value for name, value in QUICK.items() if not typed(context, name)}
    return CompressionConfig(**{name: value for name, value in given.items() if value not in (None, (), [])})
