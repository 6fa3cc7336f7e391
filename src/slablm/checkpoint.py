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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from slablm import integrity
from slablm.errors import SlabError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


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


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse a target that would lose something of the user's.

    Raises:
        SlabError: `out` is a file, or holds a model and `overwrite` is not set.
    """
    if out.is_file():
        raise SlabError(f"{out} is a file, a folder is needed")
    if not overwrite and ((out / CONFIG).exists() or any(_weights_in(out))):
        raise SlabError(f"{out} already holds a model: choose another folder or give --overwrite")


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
    from slablm.hf import GUARD

    # The original (pre-conversion) tensor names would not match the digests.
    kwargs.setdefault("save_original_format", False)
    type(model).save_pretrained(model, folder, **kwargs)
    for file in weight_files(folder):
        integrity.sort_metadata(file)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["transformers_weights"] = GUARD
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` whose files move into `out` when all went well, and vanish when not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        folder = out.parent / f".{out.name}.partial-{os.getpid()}"
        folder.mkdir()
    except OSError as error:
        raise SlabError(f"cannot write to {out.parent}: {error.strerror or error}") from error
    try:
        yield folder
        _publish(folder, out)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if full else str(error)
        raise SlabError(f"saving to {out} failed, nothing was changed there: {reason}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path) -> None:
    if not out.exists():
        folder.rename(out)
        return
    (out / CONFIG).unlink(missing_ok=True)
    new = {path.name for path in folder.iterdir()}
    for path in list(_weights_in(out)):
        if path.name not in new:
            path.unlink()
    for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):
        path.replace(out / path.name)


def _weights_in(folder: Path) -> Iterator[Path]:
    for pattern in WEIGHTS:
        yield from folder.glob(pattern)


def _remove_abandoned(out: Path) -> None:
    """Delete staging folders of processes that were killed."""
    for folder in out.parent.glob(f".{out.name}.partial-*"):
        try:
            os.kill(int(folder.name.rpartition("-")[2]), 0)
        except (ValueError, ProcessLookupError):
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            continue  # alive, somebody else's
