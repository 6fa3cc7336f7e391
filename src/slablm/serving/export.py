"""A compressed model in the formats of others: with dense weights Ŵ, as large as before it was compressed.

For tools that do not know `slablm`: they read the approximated model, and gain nothing from its size. Tensors are
decoded one by one while the files are written, so memory holds one layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from slablm.checkpoint.config_file import read_config, read_quantization_config
from slablm.checkpoint.files import CONFIG, INDEX
from slablm.checkpoint.save import COMPANIONS, MAX_SHARD_SIZE, RUN, check_target, staged
from slablm.checkpoint.shards import DTYPES, Piece, write_tensors
from slablm.checkpoint.verification import Checkpoint, open_folder
from slablm.errors import SlabError
from slablm.packing import Spec

_CARD = "README.md"
_FLOATS = ("F16", "BF16", "F32")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the folder, or the file.
        bytes: of its weights.
        compressed_bytes: of the weights in the folder that it was made from.
    """

    path: Path
    bytes: int
    compressed_bytes: int


def export_dense(source: Path, out: Path, *, max_shard_size: int = MAX_SHARD_SIZE, overwrite: bool = False) -> Exported:
    """Write an ordinary model folder, safetensors in the model's own type.

    Args:
        source: a folder compressed by slablm.
        out: target folder.
        max_shard_size: bytes of tensors per file.
        overwrite: whether files in `out` may be replaced.

    Raises:
        SlabError: `source` is none or damaged; `out` holds a model; the disk is full. Nothing is left behind.
    """
    checkpoint = verified(source)
    config = read_config(source)
    check_target(out, overwrite)
    pieces = dense_pieces(checkpoint, model_dtype(config))
    with staged(out) as folder:
        _write_config(config, folder)
        for name in COMPANIONS:
            _copy(source / name, folder / name)
        (folder / _CARD).write_text(_card(source.resolve().name), encoding="utf-8")
        shards = split_torch_state_dict_into_shards(
            {name: piece.meta() for name, piece in pieces.items()}, max_shard_size=max_shard_size
        )
        for file, names in shards.filename_to_tensors.items():
            write_tensors(folder / file, {name: pieces[name] for name in names}, {"format": "pt"})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        check_target(out, overwrite, {path.name for path in folder.iterdir()})
    return Exported(out, sum(piece.nbytes for piece in pieces.values()), compressed_bytes(checkpoint))


def verified(source: Path) -> Checkpoint:
    """A compressed folder, every byte of it compared with its digest.

    Raises:
        SlabError: it is none, or damaged; or it is a mixture of experts, whose tensors others have under other names.
    """
    checkpoint = open_folder(source)
    if read_quantization_config(source).get("experts"):
        raise SlabError(f"{source} is a mixture of experts, which cannot be exported: run it with transformers")
    checkpoint.verify()
    return checkpoint


def compressed_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a compressed model's tensors."""
    return sum(piece.nbytes for piece in checkpoint.pieces.values())


def model_dtype(config: dict[str, Any]) -> torch.dtype:
    """The type that a model's config names; float32 if it names none."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), torch.float32)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def dense_pieces(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Piece]:
    """All tensors of the dense model by name, decoded when they are read.

    Args:
        checkpoint: whose bytes are in order.
        dtype: of the decoded weights; what is stored in 16 bits is widened to it where it is float32.
    """
    stored = dict(checkpoint.pieces)
    dense: dict[str, Piece] = {}
    for name, spec in checkpoint.specs.items():
        parts = {part: stored.pop(f"{name}.{part}") for part in spec.parts()}
        shape = (spec.out_features, spec.in_features)
        dense[f"{name}.weight"] = Piece.made(_decoding(spec, parts), dtype, shape)
    for name in dict.fromkeys(checkpoint.int8_rows.values()):
        rows, scales = stored.pop(f"{name}.weight"), stored.pop(f"{name}.scales")
        dense[f"{name}.weight"] = Piece.made(_scaling(rows, scales), dtype, rows.shape)
    for name, piece in stored.items():
        widen = dtype == torch.float32 and piece.dtype in _FLOATS and DTYPES[piece.dtype] != dtype
        dense[name] = Piece.made(piece.read, dtype, piece.shape) if widen else piece
    return dict(sorted(dense.items()))


def _decoding(spec: Spec, parts: dict[str, Piece]) -> Callable[[], Tensor]:
    return lambda: spec.from_parts({part: piece.read() for part, piece in parts.items()}).dense()


def _scaling(rows: Piece, scales: Piece) -> Callable[[], Tensor]:
    return lambda: rows.read().float() * scales.read().float()[:, None]


def _write_config(config: dict[str, Any], folder: Path) -> None:
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "transformers_weights")}
    (folder / CONFIG).write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    """A file or folder of the tokenizer, where there is one."""
    if target.name in (RUN, _CARD):  # of the compressed model
        return
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.is_file():
        shutil.copyfile(source, target)


def _card(name: str) -> str:
    return (
        f"# {name}, dense\n\nThe weights of `{name}` as slablm approximates them, written out: the numbers of the "
        "compressed model, at the size of the dense one. For tools that do not read slablm's format.\n"
    )
