"""Writing a compressed model: complete or not at all.

Everything is written into a hidden folder beside the target and moved at the end, so a full disk or a kill leaves the
target as it was. When the target exists already, `config.json` is taken away first and put back last: in between it is
no loadable model, never a wrong one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import SafetensorError

from slablm.checkpoint import integrity
from slablm.checkpoint.guard import GUARD
from slablm.checkpoint.shards import Piece, open_all, write_tensors
from slablm.errors import SlabError
from slablm.runtime.linear import SlabLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
RUN = "slablm_run.json"
# What a model is saved with, where it has it.
COMPANIONS = (
    RUN, "README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
WEIGHTS = ("model.safetensors", INDEX, "model-*-of-*.safetensors")
MAX_SHARD_SIZE = 50_000_000_000  # as in transformers' save_pretrained


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    *,
    card: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a compressed model, its tokenizer and its model card.

    Args:
        model: from `slablm.compress` or loaded from a slablm folder.
        tokenizer: saved beside it.
        out: target folder.
        card: text of README.md.
        overwrite: whether an existing model in `out` may be replaced.

    Raises:
        SlabError: see `check_target`; the disk is full or not writable. Nothing is left behind.
    """
    check_target(out, overwrite)
    with _staging(out) as folder:
        _write_model(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        check_target(out, overwrite, {path.name for path in folder.iterdir()})


def save_pretrained(model: PreTrainedModel, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """`PreTrainedModel.save_pretrained` for compressed models: atomic, and with the guard for other readers.

    Args:
        model: the compressed model (bound when called as a method).
        save_directory: target folder; as everywhere in transformers, an existing model in it is replaced.
        kwargs: as for transformers; `push_to_hub` is refused, use `huggingface_hub.upload_folder`.

    Raises:
        SlabError: the disk is full or not writable. Nothing is left behind.
    """
    if kwargs.pop("push_to_hub", False):
        raise SlabError("push_to_hub is not supported while saving: save to a folder, then `hf upload` it")
    with _staging(Path(save_directory)) as folder:
        _write_model(model, folder, **kwargs)


def check_target(out: Path, overwrite: bool, names: Collection[str] = COMPANIONS) -> None:
    """Refuse a target that would lose something of the user's.

    Args:
        out: the target.
        overwrite: whether files in it may be replaced.
        names: files that are to be written there besides a model; by default all that are likely.

    Raises:
        SlabError: `out` is a file, or `overwrite` is not set and it holds a model or a file of such a name.
    """
    if out.is_file():
        raise SlabError(f"{out} is a file, a folder is needed")
    if overwrite:
        return
    way_out = "choose another folder or give --overwrite"
    if model := [path.name for path in (out / CONFIG, *sorted(_weights_in(out))) if path.exists()]:
        raise SlabError(f"{out} already holds a model: {model[0]} would be replaced: {way_out}")
    for name in sorted(names):
        if (out / name).exists():
            raise SlabError(f"{out} already holds {name}, which would be replaced: {way_out}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        SlabError: there are none.
    """
    files = [path for path in _weights_in(folder) if path.suffix == ".safetensors"]
    if not files:
        raise SlabError(f"{folder} holds no safetensors files")
    return sorted(files)


def _write_model(model: PreTrainedModel, folder: Path, **kwargs: Any) -> None:
    # The original (pre-conversion) tensor names would not match the digests.
    kwargs.setdefault("save_original_format", False)
    type(model).save_pretrained(model, folder, **kwargs)
    for file in weight_files(folder):
        integrity.sort_metadata(file)
    _count_parameters(model, folder)
    _set_guard(folder)


def assemble(
    model: PreTrainedModel, folder: Path, pieces: Mapping[str, Piece], metadata: Mapping[str, str], max_shard_size: int
) -> None:
    """Write a compressed model whose tensors lie in other files, without holding them: the files `save` would write.

    Args:
        model: the model, with a `quantization_config`; its own tensors may be on the meta device.
        folder: an empty folder.
        pieces: its tensors, one name for each.
        metadata: the header's, from `integrity.record`.
        max_shard_size: bytes of tensors per file; a tensor is never divided.
    """
    # transformers writes everything but the tensors.
    type(model).save_pretrained(model, folder, state_dict={})
    for file in list(_weights_in(folder)):
        file.unlink()
    shards = divide(model, pieces, max_shard_size)
    for file_name, inside in shards.filename_to_tensors.items():
        write_tensors(folder / file_name, {name: pieces[name] for name in inside}, {"format": "pt", **metadata})
    if shards.is_sharded:
        _write_json(folder / INDEX, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})
    _count_parameters(model, folder)
    _set_guard(folder)


def divide(model: PreTrainedModel, pieces: Mapping[str, Piece], max_shard_size: int) -> StateDictSplit:
    """Which file every tensor goes to; see `assemble`."""
    names = [name for name in model.state_dict() if name in pieces]
    assert len(names) == len(pieces), "a stored tensor has no place in the model"
    return split_torch_state_dict_into_shards(
        {name: pieces[name].meta() for name in names}, max_shard_size=max_shard_size
    )


def _count_parameters(model: PreTrainedModel, folder: Path) -> None:
    """Write the number of the model's weights into the index of a sharded checkpoint.

    transformers counts what are parameters in memory, which packed weights are not.
    """
    if not (folder / INDEX).exists():
        return
    elements = {name: math.prod(piece.shape) for name, piece in open_all(weight_files(folder)).items()}
    for name, layer in model.named_modules():
        if isinstance(layer, SlabLinear):
            for part in layer.spec.parts():
                del elements[f"{name}.{part}"]
            elements[f"{name}.weight"] = layer.out_features * layer.in_features
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["metadata"]["total_parameters"] = sum(elements.values())
    _write_json(folder / INDEX, index)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _set_guard(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["transformers_weights"] = GUARD
    _write_json(folder / CONFIG, config)


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` whose files move into `out` when all went well, and vanish when not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out)
        folder = out.parent / f".{out.name}.partial-{os.getpid()}"
        folder.mkdir()
    except OSError as error:
        raise SlabError(f"cannot write to {out.parent}: {error.strerror or error}") from error
    try:
        yield folder
        publish(folder, out, {path.name for path in folder.iterdir()})
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if full else str(error)
        raise SlabError(f"saving to {out} failed, nothing was changed there: {reason}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, out: Path, names: Collection[str]) -> None:
    """Move a complete result to its place. After a kill it can be called again, whatever has moved already.

    Args:
        folder: holds the result.
        out: target folder.
        names: all files of the result.
    """
    if not folder.exists():
        return
    if not out.exists():
        folder.rename(out)
        return
    if (folder / CONFIG).exists():  # comes last: as long as it is not there, `out` holds no model that can be loaded
        (out / CONFIG).unlink(missing_ok=True)
    for path in list(_weights_in(out)):
        if path.name not in names:
            path.unlink()
    for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):
        path.replace(out / path.name)


def _weights_in(folder: Path) -> Iterator[Path]:
    for pattern in WEIGHTS:
        yield from folder.glob(pattern)


def remove_abandoned(out: Path) -> None:
    """Delete staging folders of processes that were killed."""
    for folder in out.parent.glob(f".{out.name}.partial-*"):
        try:
            os.kill(int(folder.name.rpartition("-")[2]), 0)
        except (ValueError, ProcessLookupError):
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            continue  # alive, somebody else's
