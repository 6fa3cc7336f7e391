"""The transformers plug-in: the only file that touches its quantizer interface.

Importing this module registers ``quant_method: "slab"``, so that a plain ``AutoModelForCausalLM.from_pretrained``
loads a slablm folder. `slablm/__init__.py` imports it as soon as transformers' registry exists.

A reader *without* slablm stops at the guard (`slablm.checkpoint.guard`), which the quantizer takes away while loading.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slablm.checkpoint import integrity
from slablm.checkpoint.config_file import config_digest
from slablm.checkpoint.description import Description, drift_entry, read_drift, version_of
from slablm.checkpoint.entries import ModuleSpec
from slablm.checkpoint.guard import FORMAT_VERSION, GUARD, QUANT_METHOD, check_version
from slablm.checkpoint.layer_report import LayerReport
from slablm.checkpoint.places import place_experts, place_int8_rows, place_layers
from slablm.checkpoint.stored import stored_form
from slablm.checkpoint.verification import check_inside, open_checkpoint
from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods.drift import Drift
from slablm.packing import CodedSpec, PackedSpec
from slablm.runtime import kernels
from slablm.runtime.experts import all_experts
from slablm.runtime.int8 import int8_names, tie_scales
from slablm.runtime.linear import RowLinear, SlabLinear
from slablm.runtime.narrow import narrow_matrices
from slablm.runtime.token_path import use_token_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class SlabQuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a slablm checkpoint; see FORMAT.md.

    Args:
        modules: full module name → `ModuleSpec` (or its dict).
        value_dtype: ``float16`` or ``bfloat16``.
        compression: settings of the run (`CompressionConfig` or its dict).
        format_version: version of the format.
        drift: the drift behind each block (`Drift` or its dict); None if it was not measured.
        int8_rows: full names of the modules whose matrix is stored in int8 rows; None for none.
        experts: full names of the modules whose experts are stored one by one; None for none.

    Raises:
        SlabError: the version is not one this slablm reads, or a field is missing or wrong.
    """

    def __init__(
        self,
        modules: dict[str, Any] | None = None,
        value_dtype: str | None = None,
        compression: dict[str, Any] | CompressionConfig | None = None,
        format_version: int = FORMAT_VERSION,
        drift: Sequence[Any] | None = None,
        int8_rows: Sequence[str] | None = None,
        experts: Sequence[str] | None = None,
        **unknown: Any,
    ) -> None:
        check_version(format_version)  # a newer version may have new entries
        unknown.pop("quant_method", None)
        if unknown:
            raise SlabError(f"config.json: quantization_config is damaged (unknown entry {sorted(unknown)[0]!r})")
        description = Description.from_json(modules, value_dtype, format_version, int8_rows, experts)
        self.modules = dict(description.modules)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment] # the enum lists only built-in methods
        self.format_version = format_version
        self.value_dtype = description.value_dtype
        self.int8_rows, self.experts = description.int8_rows, description.experts
        self.drift = read_drift(drift)
        self.compression = (
            compression
            if isinstance(compression, CompressionConfig)
            else CompressionConfig.from_dict({} if compression is None else compression)
        )

    @property
    def description(self) -> Description:
        """What decides decoding."""
        return Description(self.modules, self.value_dtype, self.format_version, self.int8_rows, self.experts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as in `config.json`; what is written is never in an older version."""
        description = self.description
        return {
            "quant_method": self.quant_method,
            "format_version": description.written_version,
            "value_dtype": self.value_dtype,
            "compression": self.compression.to_dict(),
            "modules": {name: spec.to_dict() for name, spec in self.modules.items()},
            **{key: list(names) for key, names in description.lists.items()},
            **({"drift": [drift_entry(block) for block in self.drift]} if self.drift else {}),
        }


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
        paths = check_inside([str(file) for file in checkpoint_files or []], model.config.name_or_path)
        checkpoint = open_checkpoint(paths, self.quantization_config.description)
        checkpoint.verify()
        config = self.quantization_config
        # From here on they are this model's: it is saved under its own names.
        config.experts = place_experts(model, config.experts)
        config.modules = place_layers(model, config.modules, checkpoint.specs)
        place_int8_rows(model, checkpoint)
        config.int8_rows = tuple(int8_names(model))

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """What transformers does to tensors while it loads, without joining experts that are stored one by one."""
        apart = [
            f"{name}.0.{projection}.weight"
            for name in self.quantization_config.experts
            for projection in ("gate_proj", "up_proj", "down_proj")
        ]
        kept = [one for one in weight_conversions if all(one.rename_source_key(name)[1] is None for name in apart)]
        updated: list[Any] = super().update_weight_conversions(kept, *model)  # type: ignore[no-untyped-call]
        return updated

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Check the planes and make `save_pretrained` write the complete format again."""
        tie_scales(model)
        _widen(model)
        self._renew(model)
        narrow_matrices(model, getattr(torch, self.quantization_config.value_dtype))
        use_kernels(model)  # checks the planes of the layers it takes
        for name in self.quantization_config.modules:
            layer = model.get_submodule(name)
            assert isinstance(layer, SlabLinear)
            if not layer.runs_native:
                layer.validate(name)
        _own_memory(model)
        _use_own_save(model)
        return model

    def _renew(self, model: PreTrainedModel) -> None:
        """Take layers of an older format over into the present one; accelerate's own (offloading) stay as they are."""
        config = self.quantization_config
        for name, module in config.modules.items():
            layer = model.get_submodule(name)
            if isinstance(layer, RowLinear) and not hasattr(layer, "_hf_hook"):
                layer.renew(name)
                if isinstance(layer.spec, PackedSpec):
                    config.modules[name] = ModuleSpec.of(
                        layer.spec, config.description.dtype, module.output_error, module.unseen_error
                    )

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, str]]:
        """The tensors to save and the header's metadata, digests included."""
        dtype = getattr(torch, self.quantization_config.value_dtype)
        state, description = model.state_dict(), self.quantization_config.description
        # Tied tensors must stay one tensor, or transformers would write each of them.
        narrowed: dict[int, Tensor] = {}
        for name, tensor in state.items():
            if tensor.dtype == torch.float32 and tensor.ndim >= 2:
                address = tensor.data_ptr()
                if address not in narrowed:
                    narrowed[address] = stored_form(tensor, dtype)
                state[name] = narrowed[address]
        # What a checkpoint's config.json will say but for what transformers fills in while it saves: `save_pretrained`
        # here seals the files again, with what it does say.
        written = config_digest(json.loads(model.config.to_json_string()))
        metadata = integrity.metadata(state, description.written_version)
        return state, integrity.sealed(metadata, description.digest, written)

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top are, see `slablm.runtime.lora`; the packed tensors are not parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The forward is plain torch; but which experts run is decided in Python."""
        return not self.quantization_config.experts


def _widen(model: PreTrainedModel) -> None:
    """Give a float32 model its type: transformers 5.18 leaves stored 16-bit matrices of one without a head alone."""
    if model.config.dtype != torch.float32:
        return
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and not parameter.is_meta:
            parameter.data = parameter.data.float()


def _own_memory(model: nn.Module) -> None:
    """Copy what is in the mapped checkpoint file: a single vector would keep all of it in memory.

    Without kernels the packed tensors themselves stay in the mapping, and nothing would be gained.
    """
    if kernels.backend().library is None:
        return
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    copies: dict[Tensor, Tensor] = {}  # tied ones stay one
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "cpu":
                # Not its `data`: it can be a view, and would keep what it was one of.
                copies[buffer] = copies[buffer] if buffer in copies else buffer.clone()
                module._buffers[name] = copies[buffer]


def describe(
    model: PreTrainedModel, config: CompressionConfig, reports: list[LayerReport], drift: Sequence[Drift] = ()
) -> SlabQuantizationConfig:
    """Write into a freshly compressed model's config what its `SlabLinear` layers are.

    Args:
        model: the model with its `SlabLinear` layers.
        config: the settings, `value_dtype` included.
        reports: one per compressed layer.
        drift: behind every block; empty if it was not measured.
    """
    modules = {}
    for report in reports:
        layer = model.get_submodule(report.name)
        assert isinstance(layer, SlabLinear)
        assert not isinstance(layer.spec, CodedSpec)
        dtype = getattr(torch, config.value_dtype or "")
        modules[report.name] = ModuleSpec.of(layer.spec, dtype, report.output_error, report.unseen_error)
    experts = [name for name, _ in all_experts(model)]
    version = version_of(modules, experts)
    lists: dict[str, Any] = {"int8_rows": int8_names(model) or None, "experts": experts or None}
    quantization_config = SlabQuantizationConfig(
        modules, config.value_dtype or "", config, version, drift=drift, **lists
    )
    model.config.quantization_config = quantization_config
    return quantization_config


def attach(
    model: PreTrainedModel, config: CompressionConfig, reports: list[LayerReport], drift: Sequence[Drift] = ()
) -> None:
    """Tell transformers that this freshly compressed model is quantized by slablm, so that it can be saved.

    Args:
        model: the model with its `SlabLinear` layers.
        config: the settings, `value_dtype` included.
        reports: one per compressed layer.
        drift: as for `describe`.
    """
    quantization_config = describe(model, config, reports, drift)
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
        if not layer.runs_native:
            wanted = kernels.backend(layer.device).name != kernels.REFERENCE
        else:  # a loaded model has its runtime layout already; 8-bit values are made from it
            wanted = value_bits != layer.value_bits
        if wanted:
            layer.use_native(value_bits, name)
    use_token_path(model)


def _use_own_save(model: PreTrainedModel) -> None:
    """Give this instance a `save_pretrained` that writes atomically and sets the guard.

    transformers drops `transformers_weights` from the config when it saves, so the entry has to be added afterwards.
    """
    from slablm.checkpoint.save import save_pretrained

    vars(model)["save_pretrained"] = MethodType(save_pretrained, model)
