"""Digests of tensors in a safetensors file: corruption is found before a wrong model is used.

The header of every file carries ``__metadata__["slablm"]``, a JSON object with the format version and one BLAKE2b-64
digest per tensor over its type, shape and bytes. transformers writes the same metadata into each shard, so the digests
cover all shards together and a file is checked for the tensors it holds.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slablm.checkpoint.guard import FORMAT_VERSION
from slablm.checkpoint.shards import WAY_OUT, TensorFile
from slablm.errors import SlabError

METADATA_KEY = "slablm"


def digest(tensor: Tensor) -> str:
    """BLAKE2b-64 over type, shape and bytes, 16 hexadecimal digits."""
    tensor = tensor.detach().cpu().contiguous()
    hasher = hashlib.blake2b(digest_size=8)
    hasher.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    if tensor.numel():
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return hasher.hexdigest()


def metadata(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Header metadata for the tensors of a state dict; of tied tensors (one memory) only one will be stored."""
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            groups.setdefault(tensor.data_ptr(), []).append(name)
    return record({name: digest(tensor) for name, tensor in state.items()}, groups.values())


def record(digests: Mapping[str, str], groups: Iterable[Sequence[str]] = ()) -> dict[str, str]:
    """Header metadata from digests by name; of a group of names with one tensor only one is stored."""
    entry = {
        "format_version": FORMAT_VERSION,
        "digests": dict(digests),
        "tied": sorted(sorted(names) for names in groups if len(names) > 1),
    }
    return {METADATA_KEY: json.dumps(entry, sort_keys=True)}


def verify_files(paths: Sequence[Path]) -> None:
    """Compare every tensor of a checkpoint with its digest.

    Args:
        paths: all safetensors files of the checkpoint.

    Raises:
        SlabError: a file is truncated or has no digests, or a tensor is missing, unknown or different.
    """
    expected: set[str] = set()
    present: set[str] = set()
    for path in paths:
        entry, names = _verify_file(path)
        expected |= entry["digests"].keys()
        present |= names
        for tied in entry["tied"]:
            if not names.isdisjoint(tied):
                present.update(tied)
    if missing := sorted(expected - present):
        raise SlabError(f"{paths[0].parent}: tensor {missing[0]!r} is missing: {WAY_OUT}")


def _verify_file(path: Path) -> tuple[dict[str, Any], set[str]]:
    """Check one file; returns the record about the whole checkpoint and the names of this file's tensors."""
    file = TensorFile.open(path)
    entry = _entry(file.metadata, path)
    expected = entry["digests"]
    for name, piece in file.pieces.items():
        if name not in expected:
            raise SlabError(f"{path}: tensor {name!r} has no digest, the file is damaged: {WAY_OUT}")
        if digest(piece.read()) != expected[name]:
            raise SlabError(f"{path}: tensor {name!r} is corrupted: {WAY_OUT}")
    return entry, set(file.pieces)


def sort_metadata(path: Path) -> None:
    """Put the header's metadata keys in order, in place.

    safetensors writes them in the order of a hash map with a random seed; the same model would give different files.
    """
    with path.open("r+b") as file:
        length: int = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise AssertionError("a reordered safetensors header must not grow")
        file.seek(8)
        file.write(text.ljust(length))


def _entry(header: dict[str, str], path: Path) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = json.loads(header[METADATA_KEY])
        if not isinstance(entry["digests"], dict) or not isinstance(entry["tied"], list):
            raise TypeError
    except (KeyError, ValueError, TypeError):
        raise SlabError(f"{path} carries no slablm digests: it is damaged or was not written by slablm") from None
    return entry
