"""Safetensors files read and written piece by piece, with plain reads instead of a memory map.

A file is an 8-byte little-endian length, that many bytes of JSON (name → type, shape, byte range; ``__metadata__``),
and the tensors' bytes. A memory map would count every page it has touched as this process's memory for as long as the
file is open; a plain read costs the one tensor that is wanted. Writing copies the bytes from where they are, so a shard
of any size needs a few megabytes. The layout is the one safetensors itself chooses (wider types first, then by name):
the same tensors give the same bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from slablm.checkpoint.files import WAY_OUT
from slablm.errors import SlabError

# In the order in which safetensors lays them out.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LAYOUT = {name: place for place, name in enumerate(DTYPES)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 22
_LIMIT = 1 << 63


@dataclass(frozen=True)
class Piece:
    """Where one tensor lies: in a file, or in memory; or how it is made when it is wanted.

    Attributes:
        dtype: safetensors' name of the type.
        shape: dimensions.
        source: the file and the position of its first byte, the tensor itself, or what makes it.
    """

    dtype: str
    shape: tuple[int, ...]
    source: tuple[Path, int] | Tensor | Callable[[], Tensor]

    @classmethod
    def made(cls, make: Callable[[], Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Piece:
        """A tensor of this type and shape that is made anew each time it is read."""
        return cls(_NAMES[dtype], shape, lambda: make().to(dtype).contiguous())

    @classmethod
    def of(cls, tensor: Tensor) -> Piece:
        """A tensor in memory; one on the meta device gives a piece that has a size and nothing to read."""
        if not tensor.is_meta:
            tensor = tensor.detach().cpu().contiguous()
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape), tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def meta(self) -> Tensor:
        """A tensor of this type and shape on the meta device."""
        return torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")

    def read(self) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            SlabError: the file cannot be read or is shorter than its header says.
        """
        if isinstance(self.source, Tensor):
            return self.source
        if not isinstance(self.source, tuple):
            return self.source()
        # The device is named because transformers verifies files inside a meta device context.
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype], device="cpu")
        view, filled = byte_view(tensor), 0
        for chunk in self.chunks():
            view[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        return tensor

    def chunks(self) -> Iterator[memoryview | bytes]:
        """The bytes, a few megabytes at a time.

        Raises:
            SlabError: see `read`.
        """
        if not isinstance(self.source, tuple):
            yield byte_view(self.read())
            return
        path, start = self.source
        left = self.nbytes
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                while left:
                    chunk = file.read(min(left, _CHUNK))
                    if not chunk:
                        raise _damaged(path, "the file ends early")
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from error


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file.

    Attributes:
        path: the file.
        pieces: its tensors by name, in the order of the file.
        metadata: ``__metadata__`` of the header.
        header_bytes: bytes before the first tensor.
    """

    path: Path
    pieces: dict[str, Piece]
    metadata: dict[str, str]
    header_bytes: int

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read and check a header.

        Raises:
            SlabError: the file cannot be read, is truncated or no safetensors file.
        """
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, start = _read_header(file, path, size)
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from error
        metadata = header.pop("__metadata__", {})
        try:
            if not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("its metadata is no text")
            pieces = {name: _piece(entry, path, start) for name, entry in header.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"broken header: {error}") from error
        if start + sum(piece.nbytes for piece in pieces.values()) != size:
            raise _damaged(path, "its size is not the one its header says")
        return cls(path, pieces, metadata, start)


def write_tensors(path: Path, tensors: Mapping[str, Piece], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, and make sure that it has reached the disk.

    Args:
        path: the file to create.
        tensors: its tensors.
        metadata: ``__metadata__`` of the header; written in alphabetical order.

    Raises:
        OSError: the disk is full or not writable.
        SlabError: a tensor cannot be read where it is.
    """
    with path.open("wb") as file:
        file.write(header(tensors, metadata))
        for _, piece in _ordered(tensors):
            for chunk in piece.chunks():
                file.write(chunk)
        sync(file)


def header(tensors: Mapping[str, Piece], metadata: Mapping[str, str]) -> bytes:
    """What stands in a file before the first tensor; see `write_tensors`."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, piece in _ordered(tensors):
        offsets = [position, position + piece.nbytes]
        entries[name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": offsets}
        position += piece.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _ordered(tensors: Mapping[str, Piece]) -> list[tuple[str, Piece]]:
    """Tensors in the order of the file."""
    return sorted(tensors.items(), key=lambda item: (_LAYOUT[item[1].dtype], item[0]))


def open_all(paths: Iterable[Path]) -> dict[str, Piece]:
    """All tensors of several files by name.

    Raises:
        SlabError: see `TensorFile.open`.
    """
    return {name: piece for path in paths for name, piece in TensorFile.open(path).pieces.items()}


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to read or to fill."""
    if not tensor.numel():
        return memoryview(bytearray())
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def sync(file: IO[Any]) -> None:
    """Wait until a file's contents are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk (only where the system can say so)."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_header(file: IO[bytes], path: Path, size: int) -> tuple[dict[str, Any], int]:
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if 8 + length > size:
        raise _damaged(path, "no safetensors header")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"broken header: {error}") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise _damaged(path, "broken header")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two entries with one name another reader might take the other."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _piece(entry: dict[str, Any], path: Path, start: int) -> Piece:
    first, last = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown type {entry['dtype']!r}")
    if not all(type(number) is int and 0 <= number < _LIMIT for number in (first, last, *entry["shape"])):
        raise ValueError("a shape or position is no number")
    piece = Piece(entry["dtype"], tuple(entry["shape"]), (path, start + first))
    if last - first != piece.nbytes:
        raise ValueError("a tensor's bytes do not match its shape")
    return piece


def _damaged(path: Path, reason: str) -> SlabError:
    return SlabError(f"{path} cannot be read ({reason}): it is truncated or damaged, {WAY_OUT}")
