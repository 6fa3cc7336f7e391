"""Writing a compressed model: complete or not at all.

Everything is written into a hidden folder beside the target and moved at the end, so a full disk or a kill leaves the
target as it was. When the target exists already, `config.json` is taken away first and put back last: in between it is
no loadable model, never a wrong one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import SafetensorError

from slablm.checkpoint import integrity, push
from slablm.checkpoint.config_file import config_digest
from slablm.checkpoint.files import CONFIG, INDEX, variant_of, weight_files, weights_in, with_variant
from slablm.checkpoint.guard import GUARD
from slablm.checkpoint.layer_report import model_weights
from slablm.checkpoint.shards import Piece, open_all, write_tensors
from slablm.checkpoint.staging import staging_folder
from slablm.errors import SlabError
from slablm.runtime.int8 import int8_names
from slablm.runtime.linear import SlabLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RUN = "slablm_run.json"
# What a model is saved with, where it has it.
COMPANIONS = (
    RUN, "README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
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
    with staged(out) as folder:
        _write_model(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        check_target(out, overwrite, {path.name for path in folder.iterdir()})


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """`PreTrainedModel.save_pretrained` for compressed models: atomic, and with the guard for other readers.

    Args:
        model: the compressed model (bound when called as a method).
        save_directory: target folder; as everywhere in transformers, an existing model in it is replaced.
        is_main_process: whether this process writes; all others do nothing.
        state_dict: not heeded: what is saved are the packed weights.
        push_to_hub: whether the finished files are uploaded as well.
        kwargs: as for transformers.

    Raises:
        SlabError: the disk is full or not writable. Nothing is left behind.
    """
    if not is_main_process:
        return
    out = Path(save_directory)
    upload = push.prepare(model, out, kwargs) if push_to_hub else None
    with staged(out) as folder:
        _write_model(model, folder, **kwargs)
        written = {path.name for path in folder.iterdir()}
    if upload is not None and written:
        upload(written)


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
    if model := [path.name for path in (out / CONFIG, *sorted(weights_in(out))) if path.exists()]:
        raise SlabError(f"{out} already holds a model: {model[0]} would be replaced: {way_out}")
    for name in sorted(names):
        if (out / name).exists():
            raise SlabError(f"{out} already holds {name}, which would be replaced: {way_out}")


def _write_model(model: PreTrainedModel, folder: Path, variant: str | None = None, **kwargs: Any) -> None:
    # The original (pre-conversion) tensor names would not match the digests.
    kwargs.setdefault("save_original_format", False)
    type(model).save_pretrained(model, folder, variant=variant, **kwargs)
    if not (folder / CONFIG).exists():  # of several ranks one writes
        return
    _set_guard(folder)
    modules, config = _digests(model, folder)
    for file in weight_files(folder, variant):
        integrity.seal_file(file, modules, config)
    _count_parameters(model, folder, variant)


def _digests(model: PreTrainedModel, folder: Path) -> tuple[str, str]:
    """The two digests that the headers carry of a written config."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return model.config.quantization_config.description.digest, config_digest(config)


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
    for file in list(weights_in(folder)):
        file.unlink()
    _set_guard(folder)
    metadata = integrity.sealed(metadata, *_digests(model, folder))
    shards = divide(model, pieces, max_shard_size)
    for file_name, inside in shards.filename_to_tensors.items():
        write_tensors(folder / file_name, {name: pieces[name] for name in inside}, {"format": "pt", **metadata})
    if shards.is_sharded:
        _write_json(folder / INDEX, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})
    _count_parameters(model, folder)


def divide(model: PreTrainedModel, pieces: Mapping[str, Piece], max_shard_size: int) -> StateDictSplit:
    """Which file every tensor goes to; see `assemble`."""
    names = [name for name in model.state_dict() if name in pieces]
    assert len(names) == len(pieces), "a stored tensor has no place in the model"
    return split_torch_state_dict_into_shards(
        {name: pieces[name].meta() for name in names}, max_shard_size=max_shard_size
    )


def _count_parameters(model: PreTrainedModel, folder: Path, variant: str | None = None) -> None:
    """Write the number of the model's weights into the index of a sharded checkpoint.

    transformers counts what are parameters in memory, which packed weights are not.
    """
    path = folder / with_variant(INDEX, variant)
    if not path.exists():
        return
    specs = {name: layer.spec for name, layer in model.named_modules() if isinstance(layer, SlabLinear)}
    total = model_weights(open_all(weight_files(folder, variant)), specs, int8_names(model))
    index = json.loads(path.read_text(encoding="utf-8"))
    index["metadata"]["total_parameters"] = total
    _write_json(path, index)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _set_guard(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["transformers_weights"] = GUARD
    _write_json(folder / CONFIG, config)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` whose files move into `out` when all went well, and vanish when not.

    Raises:
        SlabError: the disk is full or not writable.
    """
    out = out.resolve()  # beside it, also where it is called "."
    try:
        with staging_folder(out) as folder:
            yield folder
            names = {path.name for path in folder.iterdir()}
            if names:
                publish(folder, out, names)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if full else str(error)
        raise SlabError(f"saving to {out} failed, nothing was changed there: {reason}") from error


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
    for variant in {variant_of(name) for name in names if name.endswith(".safetensors")}:
        for path in list(weights_in(out, variant)):
            if path.name not in names:
                path.unlink()
    for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):
        if path.is_dir():  # a folder takes the place of an empty one at most
            shutil.rmtree(out / path.name, ignore_errors=True)
        path.replace(out / path.name)
