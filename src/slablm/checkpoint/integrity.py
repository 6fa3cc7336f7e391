"""Digests in the headers of safetensors files: corruption is found before a wrong model is used.

The header of every file carries ``__metadata__["slablm"]``, a JSON object with the format version, one BLAKE2b-64
digest per tensor over its type, shape and bytes, one of what config.json says about the compressed layers and one of
config.json as a whole. The same object stands in each shard, so the digests cover all shards together, and shards of
two models do not mix. FORMAT.md says which bytes exactly are hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from slablm.checkpoint.files import WAY_OUT
from slablm.checkpoint.guard import FORMAT_VERSION, READABLE_VERSIONS
from slablm.checkpoint.shards import DTYPES, Piece, TensorFile
from slablm.errors import SlabError

METADATA_KEY = "slablm"
_DIGEST_BYTES = 8
UNSEALED = "0" * (2 * _DIGEST_BYTES)  # where a digest will be put when it is known
SEALED_SINCE = 4  # the format version whose headers cover config.json
_MOST_READERS = 8


@dataclass(frozen=True)
class Record:
    """What a header says about the whole checkpoint.

    Attributes:
        format_version: of the files.
        digests: by tensor name.
        tied: groups of names with one tensor, of which one is stored.
        modules: digest of what decides decoding (`slablm.checkpoint.description`); None before version 4.
        config: digest of config.json (`slablm.checkpoint.config_file`); None before version 4.
    """

    format_version: int
    digests: dict[str, str]
    tied: list[list[str]]
    modules: str | None = None
    config: str | None = None


def digest(tensor: Tensor | Piece) -> str:
    """BLAKE2b-64 over type, shape and bytes, 16 hexadecimal digits. A piece in a file is read a bit at a time."""
    piece = tensor if isinstance(tensor, Piece) else Piece.of(tensor)
    hasher = hashlib.blake2b(f"{DTYPES[piece.dtype]}{list(piece.shape)}".encode(), digest_size=_DIGEST_BYTES)
    for chunk in piece.chunks():
        hasher.update(chunk)
    return hasher.hexdigest()


def metadata(state: Mapping[str, Tensor], version: int) -> dict[str, str]:
    """Header metadata for the tensors of a state dict; of tied tensors (one memory) only one will be stored."""
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            groups.setdefault(tensor.data_ptr(), []).append(name)
    return record({name: digest(tensor) for name, tensor in state.items()}, groups.values(), version)


def record(
    digests: Mapping[str, str], groups: Iterable[Sequence[str]] = (), version: int = FORMAT_VERSION
) -> dict[str, str]:
    """Header metadata from digests by name, still to be sealed (`sealed`).

    Args:
        digests: of the tensors.
        groups: of a group of names with one tensor only one is stored.
        version: of the format, `Description.written_version`.
    """
    entry = {
        "format_version": version,
        "digests": dict(digests),
        "tied": sorted(sorted(names) for names in groups if len(names) > 1),
        "modules": UNSEALED,
        "config": UNSEALED,
    }
    return {METADATA_KEY: json.dumps(entry, sort_keys=True)}


def sealed(metadata: Mapping[str, str], modules: str, config: str) -> dict[str, str]:
    """Header metadata with the digests of the config filled in; it keeps its length.

    Args:
        metadata: from `record`.
        modules: `Description.digest`.
        config: `config_digest`.
    """
    entry = json.loads(metadata[METADATA_KEY]) | {"modules": modules, "config": config}
    return {**metadata, METADATA_KEY: json.dumps(entry, sort_keys=True)}


def seal_file(path: Path, modules: str, config: str) -> None:
    """Seal the header of a written file, and put its metadata keys in order, in place.

    safetensors writes them in the order of a hash map with a random seed; the same model would give different files.

    Args:
        path: the file.
        modules: see `sealed`.
        config: see `sealed`.
    """
    with path.open("r+b") as file:
        length: int = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(sealed(header["__metadata__"], modules, config).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise AssertionError("a reordered safetensors header must not grow")
        file.seek(8)
        file.write(text.ljust(length))


def common_record(files: Sequence[TensorFile]) -> Record:
    """The record that all files of a checkpoint carry.

    Args:
        files: all of them.

    Raises:
        SlabError: a file has none, a damaged one, or another than the first file; a tensor is missing, has no digest,
            or is there twice.
    """
    texts = {file.path: file.metadata.get(METADATA_KEY) for file in files}
    first = files[0]
    entry = _parse(texts[first.path], first.path)
    seen: dict[str, Path] = {}
    for file in files:
        if texts[file.path] != texts[first.path]:
            raise SlabError(f"{file.path} belongs to another model than {first.path.name}: {WAY_OUT}")
        for name in file.pieces:
            if name not in entry.digests:
                raise SlabError(f"{file.path}: tensor {name!r} has no digest, the file is damaged: {WAY_OUT}")
            if name in seen:
                raise SlabError(f"{file.path}: tensor {name!r} is also in {seen[name].name}: {WAY_OUT}")
            seen[name] = file.path
    aliases = {name for group in entry.tied if not seen.keys().isdisjoint(group) for name in group}
    if missing := sorted(entry.digests.keys() - seen.keys() - aliases):
        raise SlabError(f"{first.path.parent}: tensor {missing[0]!r} is missing: {WAY_OUT}")
    return entry


def verify_tensors(files: Sequence[TensorFile], expected: Mapping[str, str]) -> None:
    """Compare the bytes of every tensor with its digest, on several threads: hashing leaves Python's lock alone.

    Args:
        files: all files of a checkpoint.
        expected: digests by name.

    Raises:
        SlabError: a tensor is different, or a file cannot be read.
    """
    # The largest first: a thread that begins it last would keep the others waiting.
    tensors = sorted(
        ((file.path, name, piece) for file in files for name, piece in file.pieces.items()),
        key=lambda item: -item[2].nbytes,
    )

    def check(item: tuple[Path, str, Piece]) -> None:
        path, name, piece = item
        if digest(piece) != expected[name]:
            raise SlabError(f"{path}: tensor {name!r} is corrupted: {WAY_OUT}")

    _on_threads(check, tensors)


def _on_threads(task: Callable[[tuple[Path, str, Piece]], None], items: Sequence[tuple[Path, str, Piece]]) -> None:
    threads = min(os.cpu_count() or 1, _MOST_READERS)
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(task, item) for item in items]
        try:
            for future in futures:
                future.result()
        finally:  # after the first difference nobody needs the rest
            pool.shutdown(cancel_futures=True)


def _parse(text: str | None, path: Path) -> Record:
    """Read a record.

    Raises:
        SlabError: it is none.
    """
    damaged = SlabError(f"{path} carries no slablm digests: it is damaged or was not written by slablm")
    try:
        entry: Any = json.loads(text or "")
        result = Record(**entry)
    except (ValueError, TypeError, RecursionError):
        raise damaged from None
    if not isinstance(result.digests, dict) or not _is_tied(result.tied):
        raise damaged
    if type(result.format_version) is not int or result.format_version not in READABLE_VERSIONS:
        raise SlabError(f"{path} has format version {result.format_version!r}, which is not supported: upgrade slablm")
    wanted = str if result.format_version >= SEALED_SINCE else type(None)
    if not all(isinstance(value, wanted) for value in (result.modules, result.config)):
        raise damaged
    return result


def _is_tied(tied: Any) -> bool:
    """Whether these are groups of names."""
    return isinstance(tied, list) and all(
        isinstance(group, list) and all(isinstance(name, str) for name in group) for group in tied
    )
