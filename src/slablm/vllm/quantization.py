"""What vLLM asks about a slablm checkpoint: which layers it has, and who holds them.

vLLM builds one of these from the ``quantization_config`` in `config.json`, before it opens any weights. Everything
that can be refused is refused here, the digests of the files included: later the engine's other processes are running,
and their tracebacks hide the one line that matters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from slablm.checkpoint.description import Description
from slablm.checkpoint.guard import QUANT_METHOD
from slablm.checkpoint.verification import open_folder
from slablm.errors import SlabError
from slablm.runtime.kernels.dispatch import KERNEL_DTYPES


@register_quantization_config(QUANT_METHOD)
class SlabConfig(QuantizationConfig):  # type: ignore[misc] # vLLM need not be installed
    """A checkpoint as vLLM sees it.

    Args:
        description: of its compressed layers, by their names in the files.

    Attributes:
        modules: what is stored of each compressed layer, by the names that vLLM's model gives them.
    """

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description
        self.modules = dict(description.modules)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SlabConfig:
        """Read the ``quantization_config``.

        Raises:
            SlabError: see `Description.from_json`; or it is a mixture of experts.
        """
        description = Description.of_config(config)
        if description.experts:
            raise SlabError(
                f"vLLM cannot run the experts in {description.experts[0]!r} as slablm stores them: "
                "run the model with transformers (slablm serve)"
            )
        return cls(description)

    @classmethod
    def get_name(cls) -> str:
        """The ``quant_method``."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """What the kernels take."""
        return list(KERNEL_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        """None: where a GPU has no kernels, weights are dequantized at load."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No files beside `config.json`."""
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Compare every byte of the checkpoint with its digest, before vLLM reads any.

        Args:
            model_name: a folder, or a name on the hub.
            hf_config: not looked at.
            revision: on the hub.

        Raises:
            SlabError: see `open_folder` and `Checkpoint.verify`.
        """
        folder = Path(model_name)
        if not folder.is_dir():
            # Where vLLM's own loader will look for them.
            files = snapshot_download(model_name, revision=revision, allow_patterns=["*.safetensors", "*.json"])
            folder = Path(files)
        open_folder(folder).verify()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take over the names that vLLM's model gives its modules."""
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Who holds the weight of a layer; None for all that vLLM holds itself.

        Args:
            layer: one of vLLM's.
            prefix: its full name.

        Raises:
            SlabError: the engine's settings are none that compressed layers can run with, or it makes one layer of
                several and does not say of which.
        """
        from vllm.model_executor.layers.linear import (
            LinearBase,
            MergedColumnParallelLinear,
            QKVParallelLinear,
            UnquantizedLinearMethod,
        )
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from slablm.vllm.embedding import Int8RowsMethod
        from slablm.vllm.linear import SlabLinearMethod

        check_engine(get_current_vllm_config())
        if isinstance(layer, LinearBase):
            stored = {name: self.modules.get(name) for name in self.stored_names(prefix)}
            if not any(stored.values()):
                return UnquantizedLinearMethod()
            # BLOOM's rows, for one, get another order on the way, which packed ones cannot.
            fused = isinstance(layer, (MergedColumnParallelLinear, QKVParallelLinear))
            if fused and prefix.rpartition(".")[2] not in self.packed_modules_mapping:
                raise SlabError(
                    f"vLLM's model does not say what it joins in {prefix!r}: run it with transformers (slablm serve)"
                )
            return SlabLinearMethod(stored, self.description.dtype)
        # vLLM's models need not tell an embedding its name; slablm stores either all of them so or none.
        if isinstance(layer, VocabParallelEmbedding) and self.description.int8_rows:
            return Int8RowsMethod()
        return None

    def stored_names(self, prefix: str) -> list[str]:
        """The layers of the checkpoint that one of vLLM's is made of, in the order of its outputs."""
        parent, dot, name = prefix.rpartition(".")
        return [parent + dot + part for part in self.packed_modules_mapping.get(name, [name])]


def check_engine(config: Any) -> None:
    """Refuse what compressed layers cannot run with.

    Args:
        config: vLLM's `VllmConfig`.

    Raises:
        SlabError: naming the option.
    """
    devices = config.parallel_config.tensor_parallel_size
    if devices > 1:
        raise SlabError(
            f"--tensor-parallel-size {devices} would split compressed layers, which slablm does not: "
            "use --tensor-parallel-size 1 and, for more devices, one server on each"
        )
    if config.lora_config is not None:
        raise SlabError(
            "--enable-lora does not go with layers compressed by slablm: leave it out, or run the adapter with "
            "transformers and PEFT"
        )
