"""The number formats of a GGUF file's tensors, from its header.

The header is a list of entries (the vocabulary among them), then one of tensors. `gguf.GGUFReader` makes arrays of
every token before it comes to the tensors, which takes seconds; here they are only passed over.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

# Bytes of an entry's value by its type: integers of 1, 2 and 4 bytes, float32, bool; 8 and 9 are text and lists.
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9
# The format's own limits.
_LONGEST_NAME, _MOST_DIMENSIONS = 64, 4
_NOT_QUANTIZED = frozenset({"F16", "BF16", "F32", "F64"})


def block_formats(path: Path) -> Counter[str]:
    """Quantised weights of the decoder blocks by their format, such as ``Q4_1``.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no GGUF file of version 2 or 3, is cut off, or has something unknown in its header.
    """
    from gguf import GGMLQuantizationType

    weights: Counter[str] = Counter()
    with path.open("rb") as file:
        if file.read(4) != b"GGUF" or _number(file, "I") not in (2, 3):
            raise ValueError(f"{path} is no GGUF file of version 2 or 3")
        tensors, entries = _number(file, "Q"), _number(file, "Q")
        for _ in range(entries):
            _pass_text(file)
            _pass_value(file, _number(file, "I"))
        for _ in range(tensors):
            name = file.read(min(_number(file, "Q"), _LONGEST_NAME + 1))
            dimensions = _number(file, "I")
            if len(name) > _LONGEST_NAME or dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"{path} is no GGUF file: a tensor has too long a name or too many dimensions")
            elements = math.prod(_number(file, "Q") for _ in range(dimensions))
            kind = GGMLQuantizationType(_number(file, "I")).name
            _number(file, "Q")  # where its data begin
            if name.startswith(b"blk.") and kind not in _NOT_QUANTIZED:
                weights[kind] += elements
    return weights


def _number(file: BinaryIO, code: str) -> Any:
    size = struct.calcsize(code)
    content = file.read(size)
    if len(content) < size:
        raise ValueError("the header of a GGUF file is cut off")
    return struct.unpack(f"<{code}", content)[0]


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
