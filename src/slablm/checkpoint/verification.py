"""Everything that is checked before a checkpoint is believed, for `inspect` and for loading alike.

First what costs nothing: the index, the headers, what the files say about each other and about `config.json`
(`open_checkpoint`). Then every byte (`integrity.verify_tensors`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from slablm.checkpoint import integrity
from slablm.checkpoint.config_file import config_digest, read_config
from slablm.checkpoint.description import Description, check_parts
from slablm.checkpoint.files import (
    CONFIG,
    INDEX,
    WAY_OUT,
    check_index,
    read_index,
    weight_files,
    with_variant,
)
from slablm.checkpoint.int8_rows import check_int8_rows, check_scales
from slablm.checkpoint.layer_report import model_weights
from slablm.checkpoint.shards import Piece, TensorFile
from slablm.errors import SlabError
from slablm.packing import Spec


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers agree with its config; its tensors' bytes have not been looked at.

    Attributes:
        files: its safetensors files.
        record: what their headers say.
        specs: what is stored of each compressed layer.
        int8_rows: name of each module of int8 rows → the one under which its matrix is stored.
    """

    files: tuple[TensorFile, ...]
    record: integrity.Record
    specs: dict[str, Spec]
    int8_rows: dict[str, str]

    @property
    def pieces(self) -> dict[str, Piece]:
        """All tensors by name."""
        return {name: piece for file in self.files for name, piece in file.pieces.items()}

    @property
    def file_bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.path.stat().st_size for file in self.files)

    @property
    def model_weights(self) -> int:
        """Number of weights of the model; see `model_weights`."""
        return model_weights(self.pieces, self.specs, self.int8_rows)

    def verify(self) -> None:
        """Read every tensor and compare it with its digest.

        Raises:
            SlabError: see `integrity.verify_tensors` and `check_scales`.
        """
        integrity.verify_tensors(self.files, self.record.digests)
        check_scales(self.int8_rows, self.pieces, self.files[0].path.parent)


def open_folder(folder: Path, variant: str | None = None) -> Checkpoint:
    """Open a slablm folder and check all but its tensors' bytes.

    Args:
        folder: the model.
        variant: of its weights.

    Raises:
        SlabError: it is no slablm checkpoint, or damaged.
    """
    description = Description.of_config(read_config(folder)["quantization_config"])
    return open_checkpoint(weight_files(folder, variant), description)


def open_checkpoint(paths: Sequence[Path], description: Description) -> Checkpoint:
    """Check all of a checkpoint but its tensors' bytes.

    Args:
        paths: its safetensors files, which lie in one folder.
        description: what the config in use says about the compressed layers.

    Raises:
        SlabError: a file is truncated or damaged, or what files, index and config say does not agree.
    """
    folder = _common_folder(paths)
    files = tuple(_open(path) for path in paths)
    _check_indices(folder, files)
    record = integrity.common_record(files)
    _check_config(record, description, folder)
    pieces = {name: piece for file in files for name, piece in file.pieces.items()}
    int8_rows = check_int8_rows(description.int8_rows, pieces, record.tied, folder)
    return Checkpoint(files, record, check_parts(description, pieces, folder), int8_rows)


def check_inside(paths: Sequence[str], source: str | None) -> list[Path]:
    """The files that transformers is about to read, if it may.

    Args:
        paths: what it has found; files on the hub lie in a cache, all in one folder.
        source: what the user has asked for.

    Raises:
        SlabError: there are none, or one lies outside the model's folder.
    """
    if not paths or source is None:
        raise SlabError(
            f"transformers names no files of {source or 'this model'} whose digests could be checked: "
            "load a folder or a hub id of a slablm model, not a state dict"
        )
    root = os.path.abspath(source)  # noqa: PTH100 (links are not followed: a cache is full of them)
    for path in paths:
        full = os.path.abspath(path)  # noqa: PTH100
        if Path(source).is_dir() and Path(root) not in Path(full).parents:
            raise SlabError(f"{path} lies outside the model's folder {source}: the index is damaged, {WAY_OUT}")
    return [Path(path) for path in paths]


def _common_folder(paths: Sequence[Path]) -> Path:
    for path in paths:
        if path.parent != paths[0].parent:
            raise SlabError(f"{path} lies outside the model's folder {paths[0].parent}: {WAY_OUT}")
    return paths[0].parent


def _open(path: Path) -> TensorFile:
    """Read a header with our own eyes and with those of safetensors, which has to read it later.

    Raises:
        SlabError: one of the two cannot.
    """
    file = TensorFile.open(path)
    try:
        # Of torch's mapping the whole file would count as memory that may be written to, as under `ulimit -d`.
        with safe_open(path, framework="np"):
            return file
    except (SafetensorError, OSError) as error:
        raise SlabError(f"{path} cannot be read ({error}): it is truncated or damaged, {WAY_OUT}") from error


def _check_indices(folder: Path, files: Sequence[TensorFile]) -> None:
    """Refuse several files that no index names, or an index that says something else than they do."""
    inside = {file.path.name: frozenset(file.pieces) for file in files}
    if len(files) == 1 and "-of-" not in files[0].path.name:
        return
    for index in (folder / INDEX, *sorted(folder.glob(with_variant(INDEX, "*")))):
        if index.is_file() and set(read_index(index).values()) == inside.keys():
            check_index(index, inside)
            return
    raise SlabError(f"{folder}: no index names {' and '.join(sorted(inside)[:2])}: {WAY_OUT}")


def _check_config(record: integrity.Record, description: Description, folder: Path) -> None:
    """Refuse a config that is not the one these files were written with; before version 4 that cannot be told."""
    sealed = record.modules is not None
    if sealed != (description.format_version >= integrity.SEALED_SINCE):
        raise SlabError(
            f"{folder}: config.json says format version {description.format_version}, "
            f"the files have version {record.format_version}: {WAY_OUT}"
        )
    if not sealed:
        return
    if description.digest != record.modules:
        raise SlabError(
            f"{folder}: modules, value_dtype, experts or int8_rows of config.json is not what the files were written "
            f"with: {WAY_OUT}"
        )
    # A config that the user hands to transformers need not lie here.
    if (folder / CONFIG).is_file() and config_digest(read_config(folder)) != record.config:
        raise SlabError(
            f"{folder / CONFIG} was changed after the model was written: {WAY_OUT}, or load the unchanged model with "
            "the settings wanted (from_pretrained takes them) and save it"
        )
