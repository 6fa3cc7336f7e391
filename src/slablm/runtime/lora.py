"""LoRA adapters of PEFT beside compressed layers.

    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))

y = Ŵ x + s B A x: gradients pass through Ŵ's kernels to what lies below, A and B are trained, Ŵ never changes. PEFT is
no dependency: this module is imported when it makes a configuration (`slablm.autoload`). PEFT's own variants (DoRA,
PiSSA, ...) read a dense weight, and merging would need a new decomposition: both are refused.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from slablm.errors import SlabError
from slablm.runtime.linear import SlabLinear

# What PEFT can start an adapter from without looking at the weight.
_INITIAL_WEIGHTS = (True, False, "gaussian")


class SlabLora(Linear):
    """A compressed layer with adapters; made by PEFT."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if config.init_lora_weights not in _INITIAL_WEIGHTS:
            raise SlabError(
                f"init_lora_weights={config.init_lora_weights!r} reads a dense weight, which a compressed layer has "
                'not: use True or "gaussian"'
            )
        super().__init__(base_layer, adapter_name, config, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Only plain LoRA."""
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, SlabLinear)
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        """Adapters go where the layer is; the stored values' type is no type to train in."""
        assert isinstance(base_layer, SlabLinear)
        return base_layer.device, None

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused.

        Raises:
            SlabError: always.
        """
        raise SlabError(
            "an adapter cannot be merged into a compressed weight: keep it beside the model (save_pretrained writes "
            "it alone), or merge it into the dense model and compress that"
        )


# What PEFT makes of which layers, as its configurations take it.
CUSTOM_MODULES: dict[type[nn.Module], type[nn.Module]] = {SlabLinear: SlabLora}
