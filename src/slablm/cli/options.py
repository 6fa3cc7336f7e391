"""Options that verbs share, and the settings made from them."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

import typer

from slablm.config import CompressionConfig

Method = Annotated[str, typer.Option(help="slab+, slab (the paper's), wanda, magnitude or an arm of the ablation.")]
Ratio = Annotated[float, typer.Option(help="Compression ratio in the paper's accounting.")]
BitsPerWeight = Annotated[
    float | None, typer.Option(help="slab+: true bits per weight, instead of a ratio; chooses bits and kept entries.")
]
MagnitudeBits = Annotated[int | None, typer.Option(help="slab+: bits of a kept magnitude, 1 to 7.")]
GroupSize = Annotated[int, typer.Option(help="slab+: columns that share a scale of the magnitudes.")]
PatternText = Annotated[str, typer.Option(help="unstructured, 2:4, 4:8 or any N:M (N of every M survive).")]
Rank = Annotated[int, typer.Option(help="Rank of the low-rank part.")]
Iterations = Annotated[int, typer.Option(help="Rounds of alternating minimisation.")]
Calibration = Annotated[str, typer.Option(help="c4, wikitext2, self, builtin or a text file.")]
NumSamples = Annotated[int, typer.Option(help="Calibration windows.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per window.")]
TargetNames = Annotated[list[str] | None, typer.Option("--targets", help="Modules to compress; repeat for several.")]
IgnoredNames = Annotated[list[str] | None, typer.Option("--ignore", help="Modules to leave dense; repeat for several.")]
ValueDtype = Annotated[str | None, typer.Option(help="Stored values: float16 or bfloat16.")]
Refine = Annotated[
    bool, typer.Option("--refine", help="Then refine each block as a whole, by a few steps of Adam; takes longer.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is sampled.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for calibration activations (of each rank), such as 4GB; more of them go to a file beside OUT."
    ),
]
MaxShardSize = Annotated[str, typer.Option(help="Largest file of weights in OUT, such as 5GB.")]


def config(context: typer.Context, *names: str) -> CompressionConfig:
    """The settings that a verb was given; what was left open is the default.

    Args:
        context: the verb's; its options are called like the settings.
        names: which settings; by default all that the verb has options for.

    Raises:
        SlabError: a setting is out of range.
    """
    names = names or tuple(field.name for field in fields(CompressionConfig) if field.name in context.params)
    given = {name: context.params[name] for name in names}
    return CompressionConfig(**{name: value for name, value in given.items() if value not in (None, (), [])})
