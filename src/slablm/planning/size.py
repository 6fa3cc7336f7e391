"""How large the result will be: what is stored of a layer depends on its shape and settings alone (`methods.storage`).

Digests have a fixed length, so the headers are known as well, and the size is right to the byte. Only how `slab+` gives
more bits to some layers of a block and fewer to others is not known before; here all count as equally sensitive.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slablm.checkpoint import integrity
from slablm.checkpoint.guard import GUARD
from slablm.checkpoint.inspection import SizeOnDisk
from slablm.checkpoint.layer_report import LayerReport, model_weights
from slablm.checkpoint.save import divide
from slablm.checkpoint.shards import Piece, header
from slablm.config import CompressionConfig
from slablm.dense.opening import tensor_names
from slablm.dense.targets import Targets, find_blocks
from slablm.errors import SlabError
from slablm.methods import RowBudget, SymbolBudget, get_method, storage
from slablm.methods.allocation import Allowance, Demand
from slablm.methods.drift import Drift
from slablm.packing import PackedSpec, SymbolSpec
from slablm.runtime.int8 import int8_names
from slablm.runtime.linear import SlabLinear
from slablm.runtime.replace_module import replace_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DIGEST = "0" * 16
_ERROR = 0.123456  # errors have six decimals in config.json; now and then one is shorter


@dataclass(frozen=True)
class Size(SizeOnDisk):
    """Sizes of a result; error and time of the layers are not known.

    Attributes:
        dense_bytes: bytes of the dense model's tensors, in the type it is calibrated in.
        stored: bytes of each stored tensor, by name.
        files: number of safetensors files.
        config_bytes: bytes of config.json and, with several files, their index.
    """

    dense_bytes: int
    stored: dict[str, int]
    files: int
    config_bytes: int


Stored = RowBudget | SymbolBudget


def budgets(model: nn.Module, targets: Targets, config: CompressionConfig) -> tuple[dict[str, Stored], list[str]]:
    """What every layer stores, see `storage`; and one line per shape for which the settings are impossible."""
    found: dict[str, Stored] = {}
    problems: dict[tuple[tuple[int, int], ...], str] = {}
    symbols = get_method(config.method).takes_true_bits and config.bits_per_weight is not None
    allowance = Allowance(config.bits_per_weight or 0.0) if symbols else None
    for names in filter(None, targets.names):
        shapes = [_shape(model, name) for name in names]
        try:
            configs = [config] * len(shapes) if allowance is None else _even(shapes, config, allowance)
        except SlabError as error:
            problems.setdefault(tuple(shapes), f"{names[0]} and the other layers of its block: {error}")
            continue
        for name, shape, own in zip(names, shapes, configs, strict=True):
            try:
                found[name] = storage(shape, own)
            except SlabError as error:
                problems.setdefault((shape,), f"{name}: {error}")
    return found, list(problems.values())


def _even(shapes: list[tuple[int, int]], config: CompressionConfig, allowance: Allowance) -> list[CompressionConfig]:
    """Settings of the layers of a block that is as sensitive to each of them."""
    demands = [Demand.of(shape) for shape in shapes]
    sizes = [demand.sizes[chosen] for demand, chosen in zip(demands, allowance.allot(demands), strict=True)]
    allowance.spend(
        sum(d.weights for d in demands), sum(d.weights * size for d, size in zip(demands, sizes, strict=True))
    )
    return [replace(config, bits_per_weight=size) for size in sizes]


def plan_size(
    model: PreTrainedModel,
    stored_as: dict[str, Stored],
    config: CompressionConfig,
    max_shard_size: int,
    dense_bytes: int,
) -> Size:
    """Put empty packed layers into a model on the meta device, and look how large it is.

    Args:
        model: on the meta device, embedding and head as they are to be stored; changed in place.
        stored_as: from `budgets`.
        config: the settings, `value_dtype` included.
        max_shard_size: bytes of tensors per file.
        dense_bytes: bytes of the dense model's tensors.
    """
    from slablm.checkpoint import hf

    dtype: torch.dtype = getattr(torch, config.value_dtype or "")
    layers = tuple(_empty_layer(model, name, budget, dtype) for name, budget in stored_as.items())
    drift = [Drift(_ERROR, _ERROR)] * len(find_blocks(model)[1])
    version = hf.describe(model, config, list(layers), drift).description.written_version
    state, groups = model.state_dict(), tensor_names(model)
    pieces = {names[0]: Piece.of(_stored(state[names[0]], dtype)) for names in groups}
    metadata = {"format": "pt", **integrity.record(dict.fromkeys(state, _DIGEST), groups, version)}
    shards = divide(model, pieces, max_shard_size)
    files = [{name: pieces[name] for name in inside} for inside in shards.filename_to_tensors.values()]
    header_bytes = sum(len(header(file, metadata)) for file in files)
    stored = {name: piece.nbytes for name, piece in pieces.items()}
    config_bytes = len(model.config.to_json_string()) + len(GUARD)
    if shards.is_sharded:
        config_bytes += len(json.dumps(shards.tensor_to_filename, indent=2))
    file_bytes = sum(stored.values()) + header_bytes
    specs = {report.name: _packed_layer(model, report.name).spec for report in layers}
    weights = model_weights(pieces, specs, int8_names(model))
    sizes = header_bytes, file_bytes, weights, dense_bytes, stored, len(files), config_bytes
    return Size(layers, *sizes, head_bits=config.head_bits)


def _shape(model: nn.Module, name: str) -> tuple[int, int]:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear.out_features, linear.in_features


def _packed_layer(model: nn.Module, name: str) -> SlabLinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, SlabLinear)
    return layer


def _empty_layer(model: nn.Module, name: str, budget: Stored, dtype: torch.dtype) -> LayerReport:
    """Replace a layer by an empty packed one."""
    m, n = _shape(model, name)
    spec: PackedSpec | SymbolSpec
    kept = bits = None
    if isinstance(budget, RowBudget):
        spec, kept = PackedSpec(m, n, budget.kept, budget.rank, budget.signs, dtype), budget.kept / n
    else:
        spec, bits = SymbolSpec(m, n, budget.bits), budget.bits
    bias = model.get_submodule(name).bias
    assert bias is None or isinstance(bias, Tensor)
    replace_module(model, name, SlabLinear.from_spec(spec, bias, "meta"))
    sizes = kept, spec.paper_bits, 8 * spec.nbytes
    return LayerReport(name, (m, n), *sizes, _ERROR, 0.0, unseen_error=_ERROR, symbol_bits=bits)


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The form of `slablm.checkpoint.hf.stored_form`, without values: parameters have been rounded to fit."""
    return tensor.to("meta", dtype if tensor.dtype == torch.float32 and tensor.ndim >= 2 else tensor.dtype)
