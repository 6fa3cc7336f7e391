"""What a result depends on: so that a run goes on only with what it was begun with, and knows its own result again.

`inputs` are what a result is made from, by content: a model that was copied or downloaded anew is the same model. They
stay with the result, in `RUN`. `fingerprint` adds all else that can change a bit, down to the machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slablm.checkpoint import integrity
from slablm.checkpoint.files import CONFIG
from slablm.checkpoint.guard import READABLE_VERSIONS
from slablm.checkpoint.save import RUN
from slablm.checkpoint.shards import Piece, byte_view
from slablm.compression.options import RunOptions
from slablm.config import CompressionConfig, Excerpt
from slablm.dense.opening import DenseModel
from slablm.errors import SlabError
from slablm.system.versions import versions

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLE = 1 << 16
_SAMPLES = 2
_SHOWN_DIFFERENCES = 3
_RESULT = "result"


def inputs(dense: DenseModel, config: CompressionConfig) -> dict[str, str]:
    """What a result is made from besides the settings, by the name an error should use.

    Raises:
        SlabError: a file cannot be read.
    """
    described = dense.model.config.to_diff_dict()
    for name in ("transformers_version", "_name_or_path"):
        described.pop(name, None)
    found = {
        "model": model_digest(dense),
        "dtype": str(dense.model.dtype),
        "model config": _digest(json.dumps(described, sort_keys=True, default=str).encode()),
    }
    text = Excerpt.parse(config.calibration).file
    return found | ({"calibration text": _digest(_read(text))} if text.is_file() else {})


def fingerprint(
    made_from: Mapping[str, str], windows: Tensor, config: CompressionConfig, options: RunOptions
) -> dict[str, str]:
    """Everything the bytes of the result depend on, by the name an error should use.

    Args:
        made_from: from `inputs`.
        windows: calibration tokens.
        config: settings.
        options: everything else.
    """
    # Of a text that is longer than the windows, the rest changes nothing; nor does it matter where it lies.
    shown: dict[str, Any] = {name: value for name, value in made_from.items() if name != "calibration text"}
    shown |= {"device": options.device, "format version": READABLE_VERSIONS[-1]}
    shown |= {f"setting {key}": value for key, value in config.to_dict().items() if key != "calibration"}
    shown["calibration tokens"] = integrity.digest(windows)
    shown |= {f"version of {name}": version for name, version in versions().items()}
    # Sums are split over threads and vector lanes; other splits round differently.
    shown |= {"number of threads": torch.get_num_threads(), "CPU capability": torch.backends.cpu.get_cpu_capability()}
    return {name: str(value) for name, value in shown.items()}


def model_digest(dense: DenseModel) -> str:
    """Digest of a model's tensors, however they are divided into files: names, types, shapes and bytes.

    Of a large tensor a few pieces count, at places that its name determines: enough to tell models apart, and cheap
    for any size.
    """
    hasher = hashlib.blake2b(digest_size=8)
    state = dense.weights or dense.model.state_dict()
    for name in sorted(state):
        found = state[name]
        piece = found if isinstance(found, Piece) else Piece.of(found)
        hasher.update(f"{name} {piece.dtype} {piece.shape}\n".encode())
        for sample in _samples(name, piece):
            hasher.update(sample)
    return hasher.hexdigest()


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What is not as it was, in words; empty if all is."""
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    shown = [f"{name} (was {before.get(name)}, is {now.get(name)})" for name in names[:_SHOWN_DIFFERENCES]]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def write_run(folder: Path, made_from: Mapping[str, str]) -> None:
    """Note beside a result what it was made from.

    Args:
        folder: holds the result.
        made_from: from `inputs`.
    """
    note = {**made_from, _RESULT: _digest((folder / CONFIG).read_bytes())}
    (folder / RUN).write_text(json.dumps(note, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_run(folder: Path) -> dict[str, str] | None:
    """What the result in a folder was made from; None if that is not known of this result."""
    try:
        note = json.loads((folder / RUN).read_text(encoding="utf-8"))
        # Another model may have been saved over the one that the note is about.
        known = note.pop(_RESULT) == _digest((folder / CONFIG).read_bytes())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return dict(note) if known else None


def _samples(name: str, piece: Piece) -> Iterator[memoryview | bytes]:
    """All bytes of a small tensor; of a large one some."""
    if piece.nbytes <= _SAMPLE * _SAMPLES:
        yield from piece.chunks()
        return
    for number in range(_SAMPLES):
        start = int(_digest(f"{name} {number}".encode()), 16) % (piece.nbytes - _SAMPLE)
        if isinstance(piece.source, tuple):
            path, first = piece.source
            yield _read(path, first + start, _SAMPLE)
        else:
            yield byte_view(piece.read())[start : start + _SAMPLE]


def _read(path: Path, start: int = 0, count: int = -1) -> bytes:
    """Bytes of a file, by default all.

    Raises:
        SlabError: it cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(count)
    except OSError as error:
        raise SlabError(f"{path} cannot be read: {error.strerror or error}") from error


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
