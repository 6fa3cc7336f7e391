"""Compressed linear layers inside vLLM.

vLLM makes one layer of those that read the same inputs (q, k and v; gate and up). slablm stores each of them with a
budget of its own: their tensors differ in shape, and some may not be compressed at all, so nothing could be joined. The
fused layer gets a container for each instead, a `SlabLinear` as everywhere else or a dense layer, and its outputs are
theirs, side by side.

vLLM's loaders hand over one tensor at a time, with the parameter that it is for and the shard it belongs to. The
parameters here are empty and named like the parts in the files; their loader fills a container.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase

from slablm.checkpoint.entries import ModuleSpec
from slablm.checkpoint.files import WAY_OUT
from slablm.errors import SlabError
from slablm.runtime import kernels
from slablm.runtime.linear import RowLinear, SlabLinear, SymbolLinear

_logger = init_logger(f"vllm.{__name__}")  # vLLM shows only what is under its own name
# How vLLM calls the shards of an attention layer; elsewhere it counts them.
_ATTENTION = {"q": 0, "k": 1, "v": 2}


class SlabLinearMethod(LinearMethodBase):  # type: ignore[misc] # vLLM need not be installed
    """Loads and runs one of vLLM's linear layers, of which at least one part is compressed.

    Args:
        stored: the layers of the checkpoint that it is made of, in the order of its outputs; None for a dense one.
        value_dtype: the checkpoint's.

    Attributes:
        awaited: names of the tensors that are still to be loaded.
    """

    def __init__(self, stored: Mapping[str, ModuleSpec | None], value_dtype: torch.dtype) -> None:
        self.stored, self.value_dtype = stored, value_dtype
        self.awaited: set[str] = set()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give a layer its containers and, for each kind of tensor in them, a parameter that vLLM can load into.

        Args:
            layer: gets `containers`.
            input_size_per_partition: n, on the one device that there is.
            output_partition_sizes: rows of each layer that vLLM sees in it.
            input_size: n.
            output_size: m.
            params_dtype: type of the computation.

        Raises:
            SlabError: a layer of this shape cannot have such an entry.
        """
        # A layer that is fused in the checkpoint already is one there, whatever vLLM sees in it.
        rows = output_partition_sizes if len(self.stored) > 1 else [sum(output_partition_sizes)]
        layer.containers = nn.ModuleList()
        for (name, module), m in zip(self.stored.items(), rows, strict=True):
            container = _container(name, module, (m, input_size), self.value_dtype, params_dtype)
            layer.containers.append(container)
            for part, tensor in container.state_dict().items():
                self.awaited.add(f"{name}.{part}")
                if part not in layer._parameters:
                    layer.register_parameter(part, _part(layer, part, tensor.dtype))

    def load(self, layer: Any, part: str, tensor: Tensor, shard: str | int | None) -> None:
        """Put a tensor of a file into its container.

        Args:
            layer: with containers.
            part: which one of its tensors it is.
            tensor: as in the file.
            shard: as vLLM calls the container; None where there is only one.

        Raises:
            SlabError: the layer has no such tensor, or one of another shape.
        """
        index = _ATTENTION[shard] if isinstance(shard, str) else shard or 0
        name, target = f"{list(self.stored)[index]}.{part}", layer.containers[index].state_dict().get(part)
        if target is None or target.shape != tensor.shape:
            expected = "nothing" if target is None else list(target.shape)
            raise SlabError(f"{name!r} is {list(tensor.shape)}, vLLM's model has {expected} there: {WAY_OUT}")
        target.copy_(tensor)
        self.awaited.discard(name)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay the weights out for the kernels; without kernels for the device, make them dense.

        Args:
            layer: with all its tensors loaded.

        Raises:
            SlabError: one is missing or corrupted.
        """
        if self.awaited:
            raise SlabError(f"vLLM's model did not load {min(self.awaited)!r}: run it with transformers (slablm serve)")
        for part in [name for name, parameter in layer.named_parameters() if hasattr(parameter, "slab_part")]:
            delattr(layer, part)
        for index, (name, container) in enumerate(zip(self.stored, layer.containers, strict=True)):
            if isinstance(container, SlabLinear):
                layer.containers[index] = _ready(name, container, layer.params_dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., n] → [..., m], in the inputs' dtype."""
        outputs = [container(x) for container in layer.containers]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return joined if bias is None else joined + bias


def _part(layer: Any, part: str, dtype: torch.dtype) -> nn.Parameter:
    """An empty parameter, where vLLM's loaders find the `weight_loader` for a tensor of the files."""
    parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    # vLLM keeps the attributes of all parameters, and knows to let go of the layer of a bound method.
    vars(parameter).update(slab_part=part, weight_loader=MethodType(_load, layer))
    return parameter


def _load(layer: Any, parameter: Any, tensor: Tensor, shard: str | int | None = None) -> None:
    method = layer.quant_method
    assert isinstance(method, SlabLinearMethod)
    method.load(layer, parameter.slab_part, tensor, shard)


def _container(
    name: str, module: ModuleSpec | None, shape: tuple[int, int], value_dtype: torch.dtype, dtype: torch.dtype
) -> nn.Module:
    """An empty layer for what is stored under a name."""
    m, n = shape
    if module is None:
        return nn.Linear(n, m, bias=False, dtype=dtype).requires_grad_(False)
    try:
        return SlabLinear.from_spec(module.packed(m, n, value_dtype))
    except ValueError as error:
        raise SlabError(f"config.json is wrong about {name!r}: {error}: {WAY_OUT}") from error


def _ready(name: str, container: SlabLinear, dtype: torch.dtype) -> nn.Module:
    """A loaded container as it runs on its device."""
    if isinstance(container, RowLinear):
        container.renew(name)
    explain = kernels.symbols_backend if isinstance(container, SymbolLinear) else kernels.backend
    backend = explain(container.device)
    if backend.name != kernels.REFERENCE:
        _logger.info_once("slablm: packed weights run on %s", backend)
        container.use_native(name=name)
        return container
    _logger.warning_once("slablm: weights are dequantized to %s, as large as dense ones (%s)", dtype, backend)
    container.validate(name)
    return container.unpacked(dtype)
