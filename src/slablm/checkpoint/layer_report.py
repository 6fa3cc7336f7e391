"""What became of each layer, and what that comes to: sizes, always both, errors, always both, and the drift."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from slablm.checkpoint.shards import Piece
from slablm.methods.budget import PAPER_VALUE_BITS
from slablm.methods.drift import Drift, mean_drift
from slablm.packing import Spec

# An expert that sees fewer tokens of its own is named.
FEW_TOKENS = 256
MOST_SHOWN = 3


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: full name of the module.
        shape: (m, n).
        kept_fraction: share of the entries that are kept as values of their own; None where every entry has a symbol.
        paper_bits: size in the paper's accounting (positions not counted).
        true_bits: size with everything a reader needs.
        output_error: ‖(W − Ŵ) Xᵀ‖_F / ‖W Xᵀ‖_F on sampled calibration inputs.
        seconds: time of the decomposition.
        unseen_error: the same on inputs from text that calibrated nothing; None if there was no such text.
        symbol_bits: bits of a symbol; None where entries are kept.
        routed: of a layer of an expert, how many calibration tokens the router sends there; None for all others, and
            where it is not known.
    """

    name: str
    shape: tuple[int, int]
    kept_fraction: float | None
    paper_bits: int
    true_bits: int
    output_error: float
    seconds: float
    unseen_error: float | None = None
    symbol_bits: int | None = None
    routed: int | None = None

    @property
    def form(self) -> str:
        """What there is of an entry, for tables: the bits of its symbol, or which share of the entries is kept."""
        if self.symbol_bits is not None:
            return f"{self.symbol_bits} bits"
        return "" if self.kept_fraction is None else f"kept {self.kept_fraction:.4f}"

    @property
    def weights(self) -> int:
        """Number of weights, m · n."""
        return self.shape[0] * self.shape[1]

    @property
    def compression_ratio(self) -> float:
        """The paper's compression ratio of this layer against 16-bit values."""
        return 1 - self.paper_bits / (PAPER_VALUE_BITS * self.weights)

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight."""
        return self.true_bits / self.weights


def model_weights(stored: Mapping[str, Piece], specs: Mapping[str, Spec], int8_rows: Iterable[str]) -> int:
    """Number of weights of a whole model, however they are stored.

    Args:
        stored: its tensors by name.
        specs: what is stored of each compressed layer.
        int8_rows: names of the modules of int8 rows.
    """
    extra = {f"{name}.{part}" for name, spec in specs.items() for part in spec.parts()}
    extra |= {f"{name}.scales" for name in int8_rows}  # tied ones are stored once
    others = sum(math.prod(piece.shape) for name, piece in stored.items() if name not in extra)
    return others + sum(spec.out_features * spec.in_features for spec in specs.values())


def rarely_chosen(reports: Sequence[LayerReport]) -> dict[str, int]:
    """Experts that the router sent fewer than `FEW_TOKENS` calibration tokens to, by full name, and how many.

    They are fitted to the tokens of all experts as the others are, but hardly to any of their own.

    Args:
        reports: one per compressed layer.
    """
    experts = {report.name.rpartition(".")[0]: report.routed for report in reports if report.routed is not None}
    return {name: tokens for name, tokens in experts.items() if tokens < FEW_TOKENS}


def few_tokens_line(rare: Mapping[str, int]) -> str:
    """What to tell a user about such experts.

    Args:
        rare: from `rarely_chosen`; not empty.
    """
    shown = ", ".join(f"{name} ({tokens})" for name, tokens in list(rare.items())[:MOST_SHOWN])
    more = f" and {len(rare) - MOST_SHOWN} more" if len(rare) > MOST_SHOWN else ""
    return f"fewer than {FEW_TOKENS} calibration tokens were sent to {shown}{more}: more --num-samples would help"


def size_summary(reports: Sequence[LayerReport]) -> dict[str, Any]:
    """Total sizes of the compressed layers, both numbers: `bits_per_weight` and `compression_ratio`.

    Args:
        reports: one per compressed layer.
    """
    weights = sum(report.weights for report in reports)
    true_bits = sum(report.true_bits for report in reports)
    return {
        "weights": weights,
        "packed_bytes": true_bits // 8,
        "bits_per_weight": true_bits / weights,
        "compression_ratio": 1 - sum(report.paper_bits for report in reports) / (PAPER_VALUE_BITS * weights),
    }


def error_summary(reports: Sequence[LayerReport]) -> dict[str, float | None]:
    """Means over the compressed layers: `output_error`, and `unseen_error` where every layer has one.

    Args:
        reports: one per compressed layer.
    """
    unseen = [report.unseen_error for report in reports if report.unseen_error is not None]
    return {
        "output_error": fmean(report.output_error for report in reports),
        "unseen_error": fmean(unseen) if len(unseen) == len(reports) else None,
    }


def drift_summary(blocks: Sequence[Drift]) -> dict[str, Any] | None:
    """JSON-ready: the drift behind the `last` block, its `mean` over the blocks, and all `blocks`; None without any.

    Args:
        blocks: the drift behind every block, in order.
    """
    if not blocks:
        return None
    return {"last": vars(blocks[-1]), "mean": vars(mean_drift(blocks)), "blocks": [vars(block) for block in blocks]}
