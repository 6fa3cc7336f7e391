"""The Python API: `compress` a model in memory, `compress_folder` from files to files, `decompose` one matrix."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slablm.calibration.windows import calibration_windows
from slablm.checkpoint.layer_report import LayerReport, few_tokens_line, rarely_chosen
from slablm.compression import run
from slablm.compression.blocks import Progress, compress_blocks, unreached
from slablm.compression.options import RunOptions
from slablm.compression.preparation import check_model, check_packable, prepare_model
from slablm.compression.store import BlockStore
from slablm.config import CompressionConfig
from slablm.dense.targets import Targets, select_targets
from slablm.errors import SlabError
from slablm.methods import LayerStats, Result, get_method
from slablm.planning.checks import preflight
from slablm.system.finite import check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compress(
    model: PreTrainedModel | str,
    config: CompressionConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_layer: Progress | None = None,
    mostly_dense: bool = False,
) -> PreTrainedModel:
    """Compress a causal language model in one shot.

    Args:
        model: a transformers model (changed in place) or anything `slablm.dense.loading.load` takes.
        config: settings; the default is `slab+` at 4 true bits per weight.
        tokenizer: needed to cut calibration text; by default loaded from where the model came from.
        on_layer: called after each layer with (layers done, layers in all, `LayerReport`).
        mostly_dense: go on where less than half of the blocks' weights can be compressed.

    Returns:
        The same model with `SlabLinear` layers. ``model.save_pretrained(folder)`` writes the packed checkpoint.

    Raises:
        SlabError: bad settings, text, weights or activations; see `compress_model`.
    """
    from slablm.dense import loading

    config = config or CompressionConfig()
    if isinstance(model, str):
        model, tokenizer = loading.load(model)
    if tokenizer is None:
        from transformers import AutoTokenizer

        where, options = loading.locate(model.config.name_or_path or "")
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    check_model(model)
    targets = select_targets(model, config)
    if not mostly_dense:
        targets.check_reach()
    compress_model(model, targets, calibration_windows(model, tokenizer, config), config, on_layer)
    return model


def compress_folder(
    source: str,
    out: Path,
    config: CompressionConfig | None = None,
    options: RunOptions | None = None,
    on_layer: Progress | None = None,
    say: run.Say = lambda line: None,
) -> run.RunResult:
    """Compress a model into a folder, one block in memory at a time; what `slablm compress` does.

    Args:
        source: as for `slablm.dense.loading.load`.
        out: target folder.
        config: settings; the default is `slab+` at 4 true bits per weight.
        options: everything else.
        on_layer: see `compress`.
        say: told what is going on, one line at a time.

    Raises:
        SlabError: any bad input; cheap checks come before the model is read. Nothing is changed in `out`.
    """
    return run.compress_folder(
        source, out, config or CompressionConfig(), options or RunOptions(), on_layer, say, check=preflight
    )


def compress_model(
    model: PreTrainedModel,
    targets: Targets,
    windows: Tensor,
    config: CompressionConfig,
    on_layer: Progress | None = None,
) -> list[LayerReport]:
    """Compress in place with targets and calibration windows at hand.

    A float32 model's remaining matrices (embedding, head) are rounded to the value type first, as they are stored in
    it: what is measured in memory is then exactly what is loaded later.

    Args:
        model: the dense model.
        targets: from `select_targets`.
        windows: token ids, [windows, seq_len].
        config: settings.
        on_layer: see `compress`.

    Returns:
        One report per compressed layer. A layer that no calibration token reached stays dense, with a warning; there is
        one about experts that few were sent to.

    Raises:
        SlabError: the model is compressed already; NaN or Inf in weights or activations; an impossible ratio or
            pattern.
    """
    from slablm.checkpoint import hf

    check_packable(config.method)
    config = prepare_model(model, targets, config)
    store = BlockStore()
    reports = compress_blocks(model, targets, windows, config, on_layer, store)
    for name, reason in unreached(targets, reports).items():
        warnings.warn(f"left dense: {name} ({reason})", stacklevel=2)
    if rare := rarely_chosen(reports):
        warnings.warn(few_tokens_line(rare), stacklevel=2)
    hf.attach(model, config, reports, store.drift)
    return reports


def decompose(
    weight: Tensor, input_norms: Tensor | None = None, config: CompressionConfig | None = None, **settings: Any
) -> Result:
    """Decompose one matrix.

    Args:
        weight: W, [out_features, in_features] = [m, n].
        input_norms: d, ‖X[:, j]‖₂ of the calibration inputs, [n]; all ones by default.
        config: settings, by default of the paper's SLaB, as `slab+` needs more than norms; or name them one by one in
            `settings` (``ratio=0.6, rank=2``).
        settings: fields of `CompressionConfig`, on top of `config`.

    Returns:
        A `Decomposition` (or, from a yardstick method, its own kind of result); ``.dense()`` is Ŵ, ``.bits()`` the
        paper's size.

    Raises:
        SlabError: wrong shapes, NaN or Inf, or an impossible ratio or pattern.
    """
    config = replace(config or CompressionConfig(method="slab"), **settings)
    if weight.ndim != 2:
        raise SlabError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
    n = weight.shape[1]
    norms = torch.ones(n, device=weight.device) if input_norms is None else input_norms.float()
    if norms.shape != (n,):
        raise SlabError(f"input_norms must have shape ({n},) to match the weight, got {tuple(norms.shape)}")
    check_finite(weight, "weight")
    check_finite(norms, "input_norms")
    stats = LayerStats(norms, tokens=0, sample=torch.empty(0, n))
    return get_method(config.method).function(weight, stats, config)
