"""The transformers plug-in: the only file that touches its quantizer interface.

Importing this module registers ``quant_method: "slab"``, so that a plain ``AutoModelForCausalLM.from_pretrained``
loads a slablm folder. `slablm/__init__.py` imports it as soon as transformers' registry exists.

A reader *without* slablm stops at the guard (`slablm.checkpoint.guard`), which the quantizer takes away while loading.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slablm.checkpoint import integrity
from slablm.checkpoint.guard import FIRST_WITH_FP16_GRID, FORMAT_VERSION, GUARD, QUANT_METHOD, check_version
from slablm.checkpoint.layer_report import LayerReport
from slablm.checkpoint.stored import stored_form
from slablm.config import VALUE_DTYPES, CompressionConfig
from slablm.errors import SlabError
from slablm.packing import PackedSpec
from slablm.runtime import kernels
from slablm.runtime.linear import SlabLinear
from slablm.runtime.narrow import narrow_matrices
from slablm.runtime.replace_module import replace_module

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModuleSpec:
    """What `config.json` says about one compressed layer.

    Attributes:
        kept: entries k kept per row.
        rank: rank of the factors.
        signs: ternary states (True) or a bitmap of positions (False).
        output_error: relative output error measured while compressing.
        unseen_error: the same on text that calibrated nothing; None if it was not measured.
        value_bits: bits of a code if the values lie on a grid, else None.
        group_size: columns that share a scale of the grid, else None.
    """

    kept: int
    rank: int
    signs: bool
    output_error: float
    unseen_error: float | None = None
    value_bits: int | None = None
    group_size: int | None = None

    def packed(self, out_features: int, in_features: int, value_dtype: torch.dtype) -> PackedSpec:
        """What is stored of this layer."""
        return PackedSpec(
            out_features, in_features, self.kept, self.rank, self.signs, value_dtype, self.value_bits, self.group_size
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; what a layer does not have is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@register_quantization_config(QUANT_METHOD)
class SlabQuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a slablm checkpoint; see FORMAT.md.

    Args:
        modules: full module name → `ModuleSpec` (or its dict).
        value_dtype: ``float16`` or ``bfloat16``.
        compression: settings of the run (`CompressionConfig` or its dict).
        format_version: version of the format.

    Raises:
        SlabError: the version is not one this slablm reads, or a field is missing or wrong.
    """

    def __init__(
        self,
        modules: dict[str, Any] | None = None,
        value_dtype: str = "float16",
        compression: dict[str, Any] | CompressionConfig | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        check_version(format_version)
        unknown.pop("quant_method", None)
        if unknown or not modules or value_dtype not in VALUE_DTYPES:
            what = f"unknown entry {sorted(unknown)[0]!r}" if unknown else "modules or value_dtype missing or wrong"
            raise SlabError(f"config.json: quantization_config is damaged ({what})")
        try:
            self.modules = {
                name: spec if isinstance(spec, ModuleSpec) else ModuleSpec(**spec) for name, spec in modules.items()
            }
        except TypeError as error:
            raise SlabError(f"config.json: quantization_config.modules is damaged ({error})") from error
        self.quant_method = QUANT_METHOD  # type: ignore[assignment] # the enum lists only built-in methods
        self.format_version = format_version
        self.value_dtype = value_dtype
        self.compression = (
            compression
            if isinstance(compression, CompressionConfig)
            else CompressionConfig.from_dict(compression or {})
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as in `config.json`."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "value_dtype": self.value_dtype,
            "compression": self.compression.to_dict(),
            "modules": {name: spec.to_dict() for name, spec in self.modules.items()},
        }

    def packed_spec(self, name: str, linear: nn.Linear) -> PackedSpec:
        """Shapes and types of a layer's packed tensors."""
        spec = self.modules[name]
        dtype = getattr(torch, self.value_dtype)
        packed = spec.packed(linear.out_features, linear.in_features, dtype)
        # An old file means the numbers that were measured when it was written.
        return packed if self.format_version >= FIRST_WITH_FP16_GRID else replace(packed, grid_dtype=dtype)


@register_quantizer(QUANT_METHOD)
class SlabHfQuantizer(HfQuantizer):
    """Loads and saves slablm checkpoints inside transformers."""

    requires_calibration = True
    quantization_config: SlabQuantizationConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Called with the config before weights are looked for: the place to take the guard away."""
        if getattr(config, "transformers_weights", None) == GUARD:
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Check the files, then put empty `SlabLinear` layers where the checkpoint has packed ones."""
        integrity.verify_files([Path(file) for file in checkpoint_files or []])
        for name in self.quantization_config.modules:
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                linear = None
            if not isinstance(linear, nn.Linear):
                raise SlabError(f"config.json lists a compressed layer {name!r} that {type(model).__name__} lacks")
            replace_module(
                model, name, SlabLinear.from_spec(self.quantization_config.packed_spec(name, linear), linear.bias)
            )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Check the planes and make `save_pretrained` write the complete format again."""
        narrow_matrices(model, getattr(torch, self.quantization_config.value_dtype))
        use_kernels(model)  # checks the planes of the layers it takes
        for name in self.quantization_config.modules:
            layer = model.get_submodule(name)
            assert isinstance(layer, SlabLinear)
            if layer.native is None:
                layer.validate(name)
        _own_memory(model)
        _use_own_save(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, str]]:
        """The tensors to save and the header's metadata, digests included."""
        dtype = getattr(torch, self.quantization_config.value_dtype)
        state = model.state_dict()
        # Tied tensors must stay one tensor, or transformers would write each of them.
        narrowed: dict[int, Tensor] = {}
        for name, tensor in state.items():
            if tensor.dtype == torch.float32 and tensor.ndim >= 2:
                address = tensor.data_ptr()
                if address not in narrowed:
                    narrowed[address] = stored_form(tensor, dtype)
                state[name] = narrowed[address]
        return state, integrity.metadata(state)

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top are, see `slablm.runtime.lora`; the packed tensors are not parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The forward is plain torch."""
        return True


def _own_memory(model: nn.Module) -> None:
    """Copy what is left in the mapped checkpoint file: a few small vectors would keep all of it in memory.

    Without kernels the packed tensors themselves stay in the mapping, and nothing would be gained.
    """
    if kernels.backend().library is None:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def describe(model: PreTrainedModel, config: CompressionConfig, reports: list[LayerReport]) -> SlabQuantizationConfig:
    """Write into a freshly compressed model's config what its `SlabLinear` layers are.

    Args:
        model: the model with its `SlabLinear` layers.
        config: the settings, `value_dtype` included.
        reports: one per compressed layer.
    """
    modules = {}
    for report in reports:
        layer = model.get_submodule(report.name)
        assert isinstance(layer, SlabLinear)
        spec, unseen = layer.spec, report.unseen_error
        modules[report.name] = ModuleSpec(
            spec.kept,
            spec.rank,
            spec.signs,
            round(report.output_error, 6),
            None if unseen is None else round(unseen, 6),
            spec.value_bits,
            spec.group_size,
        )
    quantization_config = SlabQuantizationConfig(modules, config.value_dtype or "", config)
    model.config.quantization_config = quantization_config
    return quantization_config


def attach(model: PreTrainedModel, config: CompressionConfig, reports: list[LayerReport]) -> None:
    """Tell transformers that this freshly compressed model is quantized by slablm, so that it can be saved.

    Args:
        model: the model with its `SlabLinear` layers.
        config: the settings, `value_dtype` included.
        reports: one per compressed layer.
    """
    quantization_config = describe(model, config, reports)
    # These three are what `from_pretrained` sets on a quantized model.
    vars(model).update(
        hf_quantizer=SlabHfQuantizer(quantization_config, pre_quantized=True),
        is_quantized=True,
        quantization_method=QUANT_METHOD,
    )
    narrow_matrices(model, getattr(torch, quantization_config.value_dtype))
    use_kernels(model)
    _use_own_save(model)


def use_kernels(model: nn.Module, value_bits: int = 16) -> None:
    """Let the compressed layers run on the kernels of their device, where there are any.

    Layers that accelerate moves in and out (device maps with offloading) keep their packed buffers: only those can be
    moved.

    Args:
        model: a compressed model.
        value_bits: 16 runs the stored values; 8 quantizes them in memory, which is faster and smaller, costs a
            little quality, and gives a model that can no longer be saved.

    Raises:
        SlabError: a corrupted plane, or an unknown `value_bits`.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, SlabLinear) or hasattr(layer, "_hf_hook"):
            continue
        if layer.native is None:
            wanted = kernels.backend(layer.device).name != kernels.REFERENCE
        else:  # a loaded model has its runtime layout already; 8-bit values are made from it
            wanted = layer.native.scales is None and value_bits != 16
        if wanted:
            layer.use_native(value_bits, name)


def _use_own_save(model: PreTrainedModel) -> None:
    """Give this instance a `save_pretrained` that writes atomically and sets the guard.

    transformers drops `transformers_weights` from the config when it saves, so the entry has to be added afterwards.
    """
    from slablm.checkpoint.save import save_pretrained

    vars(model)["save_pretrained"] = MethodType(save_pretrained, model)
