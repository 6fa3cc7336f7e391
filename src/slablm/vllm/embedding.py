"""Embedding and head in int8 rows (`--head-bits 8`) inside vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from slablm.errors import SlabError
from slablm.runtime import kernels
from slablm.runtime.int8 import rows_of


class Int8RowsMethod(QuantizeMethodBase):  # type: ignore[misc] # vLLM need not be installed
    """Loads and runs an embedding or a head whose rows have 8 bits and an FP16 scale each, as they are stored."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Give a layer room for the rows and their scales.

        Args:
            layer: gets `weight` [m, n] int8 and `scales` [m] float16.
            input_size_per_partition: n.
            output_partition_sizes: of m, rows that fill the vocabulary up included.
            input_size: n.
            output_size: m.
            params_dtype: type of the computation.
            attributes: vLLM's loader for the two.
        """
        weight = torch.empty(output_size, input_size, dtype=torch.int8)
        scales = torch.full((output_size,), torch.nan, dtype=torch.float16)
        for name, tensor in {"weight": weight, "scales": scales}.items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            # The loader takes one row for each token of the vocabulary, and sets those behind them to 0.
            vars(parameter).update(attributes, output_dim=0)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that there is something.

        Args:
            layer: with its rows loaded.

        Raises:
            SlabError: vLLM's model has not loaded the scales.
        """
        if not torch.isfinite(layer.scales).all():
            raise SlabError(
                "vLLM's model did not load the scales of its embedding or head in int8 rows: "
                "compress the model with --head-bits 16"
            )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., n] → [..., m], in the inputs' dtype."""
        outputs = kernels.dense_linear(x, layer.weight, layer.scales)
        return outputs if bias is None else outputs + bias

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Token ids [...] → [..., n], in the type of the computation."""
        return rows_of(layer.weight, layer.scales, input_).to(layer.params_dtype)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let the head have the embedding's rows and scales."""
        layer.weight, layer.scales = embed_tokens.weight, embed_tokens.scales
        return layer
