"""The tensors of a GGUF file, their number formats and sizes, from its header.

The header is a list of entries (the vocabulary among them), then one of tensors. `gguf.GGUFReader` makes arrays of
every token before it comes to the tensors, which takes seconds; here they are only passed over.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

# Bytes of an entry's value by its type: integers of 1, 2 and 4 bytes, float32, bool; 8 and 9 are text and lists.
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9
_ARCHITECTURE = b"general.architecture"
# The format's own limits.
_LONGEST_NAME, _MOST_DIMENSIONS = 64, 4
_NOT_QUANTIZED = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: such as ``blk.0.attn_q.weight``.
        elements: number of its values.
        kind: number format, such as ``Q4_1``.
        nbytes: its bytes in the file, without what aligns the next one.
    """

    name: str
    elements: int
    kind: str
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What stands in front of a GGUF file's tensors, as far as it is of interest here.

    Attributes:
        architecture: such as ``llama``; empty if the file names none.
        tensors: all tensors, in the file's order.
    """

    architecture: str
    tensors: tuple[StoredTensor, ...]


def read_header(path: Path) -> Header:
    """Read a header.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no GGUF file of version 2 or 3, is cut off, or has something unknown in its header.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF" or _number(file, "I") not in (2, 3):
            raise ValueError(f"{path} is no GGUF file of version 2 or 3")
        tensors, entries = _number(file, "Q"), _number(file, "Q")
        architecture = ""
        for _ in range(entries):
            key, kind = _text(file), _number(file, "I")
            if key == _ARCHITECTURE and kind == _TEXT:
                architecture = _text(file).decode("utf-8", "replace")
            else:
                _pass_value(file, kind)
        return Header(architecture, tuple(_tensor(file, path) for _ in range(tensors)))


def block_formats(path: Path) -> Counter[str]:
    """Quantised weights of the decoder blocks by their format, such as ``Q4_1``.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
        ValueError: see `read_header`.
    """
    weights: Counter[str] = Counter()
    for tensor in read_header(path).tensors:
        if tensor.name.startswith("blk.") and tensor.kind not in _NOT_QUANTIZED:
            weights[tensor.kind] += tensor.elements
    return weights


def _tensor(file: BinaryIO, path: Path) -> StoredTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = file.read(min(_number(file, "Q"), _LONGEST_NAME + 1))
    dimensions = _number(file, "I")
    if len(name) > _LONGEST_NAME or dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"{path} is no GGUF file: a tensor has too long a name or too many dimensions")
    elements = math.prod(_number(file, "Q") for _ in range(dimensions))
    kind = GGMLQuantizationType(_number(file, "I"))
    _number(file, "Q")  # where its data begin
    block, nbytes = GGML_QUANT_SIZES[kind]
    return StoredTensor(name.decode("utf-8", "replace"), elements, kind.name, elements // block * nbytes)


def _number(file: BinaryIO, code: str) -> Any:
    size = struct.calcsize(code)
    content = file.read(size)
    if len(content) < size:
        raise ValueError("the header of a GGUF file is cut off")
    return struct.unpack(f"<{code}", content)[0]


def _text(file: BinaryIO) -> bytes:
    """A text's first bytes; the file is behind it afterwards."""
    length = _number(file, "Q")
    content = file.read(min(length, _LONGEST_NAME))
    file.seek(min(length - len(content), 1 << 40), 1)
    return content


def _pass_text(file: BinaryIO) -> None:
    # Relative to here, and not beyond what `seek` can take.
    file.seek(min(_number(file, "Q"), 1 << 40), 1)


def _pass_value(file: BinaryIO, kind: int) -> None:
    """Go behind a value.

    Raises:
        ValueError: a type that is unknown, lists of lists included.
    """
    count = 1
    if kind == _LIST:
        kind, count = _number(file, "I"), _number(file, "Q")
    if kind == _TEXT:
        for _ in range(count):
            _pass_text(file)
    elif kind in _BYTES:
        file.seek(min(_BYTES[kind] * count, 1 << 40), 1)
    else:
        raise ValueError(f"an entry of a GGUF file has the unknown type {kind}")
