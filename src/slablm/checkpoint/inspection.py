"""What a slablm folder holds: integrity, exact sizes and the error of every layer, read without loading the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slablm.checkpoint import integrity
from slablm.checkpoint.layer_report import LayerReport, size_summary
from slablm.checkpoint.save import CONFIG, weight_files
from slablm.checkpoint.shards import Piece, TensorFile
from slablm.errors import SlabError
from slablm.methods.budget import PAPER_VALUE_BITS


@dataclass(frozen=True)
class SizeOnDisk:
    """Compressed layers and the files that hold them.

    Attributes:
        layers: one report per compressed layer.
        header_bytes: bytes of all safetensors headers, digests included.
        file_bytes: bytes of all safetensors files.
    """

    layers: tuple[LayerReport, ...]
    header_bytes: int
    file_bytes: int

    @property
    def weights(self) -> int:
        """Number of weights in the compressed layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """True bits per target weight: packed tensors and headers on disk."""
        return (sum(layer.true_bits for layer in self.layers) + 8 * self.header_bytes) / self.weights

    @property
    def compression_ratio(self) -> float:
        """The paper's compression ratio over all compressed layers."""
        return float(size_summary(self.layers)["compression_ratio"])


@dataclass(frozen=True)
class Inspection(SizeOnDisk):
    """Contents of a checkpoint; the layers' `seconds` are 0, as time is not stored.

    Attributes:
        settings: the compression settings.
    """

    settings: dict[str, Any]

    @property
    def kept_fraction(self) -> float:
        """Share of the target weights that are kept as values."""
        return sum(layer.kept_fraction * layer.weights for layer in self.layers) / self.weights

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "bits_per_weight": self.bits_per_weight,
            "compression_ratio": self.compression_ratio,
            "kept_fraction": self.kept_fraction,
            "weights": self.weights,
            "file_bytes": self.file_bytes,
            "compression": self.settings,
            "tensors": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "kept_fraction": layer.kept_fraction,
                    "bits_per_weight": layer.bits_per_weight,
                    "compression_ratio": layer.compression_ratio,
                    "output_error": layer.output_error,
                    "unseen_error": layer.unseen_error,
                }
                for layer in self.layers
            ],
        }


def inspect_folder(folder: Path) -> Inspection:
    """Check a checkpoint and measure it.

    Args:
        folder: a slablm checkpoint.

    Raises:
        SlabError: it is none, its format is unknown, or a file is damaged.
    """
    from slablm.checkpoint.hf import SlabQuantizationConfig

    config = read_quantization_config(folder)
    quantization = SlabQuantizationConfig(**config)
    files = weight_files(folder)
    integrity.verify_files(files)
    opened = [TensorFile.open(file) for file in files]
    pieces = {name: piece for file in opened for name, piece in file.pieces.items()}
    layers = []
    for name, spec in sorted(quantization.modules.items(), key=lambda item: _by_depth(item[0])):
        shapes = [_piece(pieces, f"{name}.{part}", folder).shape for part in ("left", "right")]
        stored = spec.packed(shapes[0][0], shapes[1][1], getattr(torch, quantization.value_dtype))
        layers.append(
            LayerReport(
                name,
                (stored.out_features, stored.in_features),
                kept_fraction=spec.kept / stored.in_features,
                paper_bits=stored.paper_bits,
                true_bits=8 * sum(_piece(pieces, f"{name}.{part}", folder).nbytes for part in stored.parts()),
                output_error=spec.output_error,
                seconds=0.0,
                unseen_error=spec.unseen_error,
                value_bits=spec.value_bits or PAPER_VALUE_BITS,
                group_size=spec.group_size,
            )
        )
    return Inspection(
        tuple(layers),
        header_bytes=sum(file.header_bytes for file in opened),
        file_bytes=sum(file.stat().st_size for file in files),
        settings=quantization.compression.to_dict(),
    )


def _piece(pieces: dict[str, Piece], name: str, folder: Path) -> Piece:
    """A tensor of the checkpoint.

    Raises:
        SlabError: it is missing.
    """
    if name not in pieces:
        raise SlabError(f"{folder}: tensor {name!r} is missing: download or compress it again")
    return pieces[name]


def _by_depth(name: str) -> list[tuple[int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def read_quantization_config(folder: Path) -> dict[str, Any]:
    """``quantization_config`` of a slablm folder.

    Raises:
        SlabError: the folder or file is missing or broken, or it is not a slablm checkpoint.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["quantization_config"]
        if config["quant_method"] != "slab":
            raise KeyError
    except FileNotFoundError:
        raise SlabError(f"{path} does not exist: {folder} is no model folder") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise SlabError(f"{path} is damaged: {error}") from error
    except (KeyError, TypeError):
        raise SlabError(f"{folder} is not a slablm checkpoint (no quant_method 'slab' in {CONFIG})") from None
    assert isinstance(config, dict)
    return config
