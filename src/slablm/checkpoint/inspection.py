"""What a slablm folder holds: integrity, exact sizes and the error of every layer, read without loading the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slablm.checkpoint.config_file import read_quantization_config
from slablm.checkpoint.entries import ModuleSpec
from slablm.checkpoint.files import weight_files
from slablm.checkpoint.layer_report import LayerReport, drift_summary, size_summary
from slablm.checkpoint.verification import open_checkpoint
from slablm.methods.drift import Drift
from slablm.packing import Spec, SymbolSpec

__all__ = ["Inspection", "SizeOnDisk", "inspect_folder", "read_quantization_config"]


@dataclass(frozen=True)
class SizeOnDisk:
    """Compressed layers and the files that hold them.

    Attributes:
        layers: one report per compressed layer.
        header_bytes: bytes of all safetensors headers, digests included.
        file_bytes: bytes of all safetensors files.
        model_weights: number of weights of the whole model.
        head_bits: bits of a weight of head and embedding, 16 or 8.
    """

    layers: tuple[LayerReport, ...]
    header_bytes: int
    file_bytes: int
    model_weights: int
    head_bits: int = field(default=16, kw_only=True)

    @property
    def weights(self) -> int:
        """Number of weights in the compressed layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """True bits per target weight: packed tensors and headers on disk."""
        return (sum(layer.true_bits for layer in self.layers) + 8 * self.header_bytes) / self.weights

    @property
    def model_bits_per_weight(self) -> float:
        """True bits per weight of the whole model: its files, over all weights, compressed or not."""
        return 8 * self.file_bytes / self.model_weights

    @property
    def compression_ratio(self) -> float:
        """The paper's compression ratio over all compressed layers."""
        return float(size_summary(self.layers)["compression_ratio"])


@dataclass(frozen=True)
class Inspection(SizeOnDisk):
    """Contents of a checkpoint; the layers' `seconds` are 0, as time is not stored.

    Attributes:
        settings: the compression settings.
        drift: behind every block; empty if it was not measured.
    """

    settings: dict[str, Any]
    drift: tuple[Drift, ...] = ()

    @property
    def kept_fraction(self) -> float | None:
        """Share of the target weights that are kept as values; None where all have symbols."""
        kept = [layer.kept_fraction * layer.weights for layer in self.layers if layer.kept_fraction is not None]
        return sum(kept) / self.weights if kept else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "bits_per_weight": self.bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
            "compression_ratio": self.compression_ratio,
            "kept_fraction": self.kept_fraction,
            "weights": self.weights,
            "model_weights": self.model_weights,
            "file_bytes": self.file_bytes,
            "head_bits": self.head_bits,
            "compression": self.settings,
            "drift": drift_summary(self.drift),
            "tensors": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "kept_fraction": layer.kept_fraction,
                    "symbol_bits": layer.symbol_bits,
                    "bits_per_weight": layer.bits_per_weight,
                    "compression_ratio": layer.compression_ratio,
                    "output_error": layer.output_error,
                    "unseen_error": layer.unseen_error,
                }
                for layer in self.layers
            ],
        }


def inspect_folder(folder: Path, variant: str | None = None) -> Inspection:
    """Check a checkpoint and measure it.

    Args:
        folder: a slablm checkpoint.
        variant: of its weights, as `save_pretrained` was given it.

    Raises:
        SlabError: it is none, its format is unknown, or a file is damaged.
    """
    from slablm.checkpoint.hf import SlabQuantizationConfig

    quantization = SlabQuantizationConfig(**read_quantization_config(folder))
    checkpoint = open_checkpoint(weight_files(folder, variant), quantization.description)
    checkpoint.verify()
    layers = [
        _report(name, quantization.modules[name], checkpoint.specs[name])
        for name in sorted(quantization.modules, key=_by_depth)
    ]
    return Inspection(
        tuple(layers),
        header_bytes=sum(file.header_bytes for file in checkpoint.files),
        file_bytes=checkpoint.file_bytes,
        model_weights=checkpoint.model_weights,
        settings=quantization.compression.to_dict(),
        drift=quantization.drift,
        head_bits=8 if quantization.int8_rows else 16,
    )


def _report(name: str, module: ModuleSpec, stored: Spec) -> LayerReport:
    return LayerReport(
        name,
        (stored.out_features, stored.in_features),
        kept_fraction=None if isinstance(stored, SymbolSpec) else stored.kept / stored.in_features,
        paper_bits=stored.paper_bits,
        true_bits=8 * stored.nbytes,
        output_error=module.output_error,
        seconds=0.0,
        unseen_error=module.unseen_error,
        symbol_bits=stored.bits if isinstance(stored, SymbolSpec) else None,
    )


def _by_depth(name: str) -> list[tuple[int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
