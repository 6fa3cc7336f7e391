"""One weight: decomposed, rounded as it will be stored, and measured."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

import slablm.compression.cpu_sweep
import slablm.compression.gpu_sweep  # noqa: F401  # so that methods find them
from slablm.checkpoint.layer_report import LayerReport
from slablm.checkpoint.stored import value_dtype
from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods import Decomposition, LayerStats, PrunedWeight, SymbolWeight, get_method
from slablm.packing import Packed, pack


def cost(shape: Sequence[int], method: str) -> float:
    """About how long a weight takes beside others, in any unit.

    With error feedback m n² for the sweeps, and n³ / 6 for what is done with the Gram matrix alone. (Measured, `slab+`
    on a CPU with m of 256 and 1,024 and n of 1,024, 2,048 and 4,096.)

    Args:
        shape: (m, n).
        method: its name.
    """
    m, n = shape
    return m * n * n + n**3 / 6 if get_method(method).needs_gram else m * n


def compress_layer(
    name: str, weight: Tensor, stats: LayerStats, config: CompressionConfig
) -> tuple[LayerReport, Tensor, Packed | None]:
    """Run the method on one weight and round the result as it is stored.

    Args:
        name: full name of the layer, for errors and the report.
        weight: W, [m, n].
        stats: statistics of its inputs.
        config: method and settings.

    Returns:
        The report, Ŵ [m, n] float32, and its packed form if the method has one.

    Raises:
        SlabError: see `compress_blocks`.
    """
    start = time.perf_counter()
    try:
        result = get_method(config.method).function(weight, stats, config)
    except SlabError as error:
        raise SlabError(f"{name}: {error}") from error
    if weight.device.type == "cuda":  # until here the work is only launched
        torch.cuda.synchronize(weight.device)
    seconds = time.perf_counter() - start
    dtype = value_dtype(config, weight.dtype)
    packed: Packed | None = None
    kept: float | None = None
    if isinstance(result, Decomposition | SymbolWeight):
        packed = pack(result, dtype, name)
        approximation, true_bits, paper_bits = packed.dense(), 8 * packed.nbytes, packed.spec.paper_bits
        kept = result.kept / weight.shape[1] if isinstance(result, Decomposition) else None
    else:
        approximation, true_bits, paper_bits = result.dense(), result.true_bits(), result.bits()
        if isinstance(result, PrunedWeight):
            approximation, kept = approximation.to(dtype).float(), result.values.numel() / weight.numel()
    report = LayerReport(
        name=name,
        shape=result.shape,
        kept_fraction=kept,
        paper_bits=paper_bits,
        true_bits=true_bits,
        output_error=stats.output_error(weight, approximation),
        seconds=seconds,
        unseen_error=stats.unseen_error(weight, approximation),
        symbol_bits=result.symbol_bits if isinstance(result, SymbolWeight) else None,
        routed=stats.routed,
    )
    return report, approximation, packed
