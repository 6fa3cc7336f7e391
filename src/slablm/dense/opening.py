"""Opening a dense model: as a whole, or empty, with the places of its tensors.

`open_dense` builds the model on the meta device, where a tensor has a shape and no bytes, from its config alone, and
finds out in which file every tensor lies. A model that cannot be read tensor by tensor is read as a whole, with the
reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slablm.checkpoint.files import WAY_OUT
from slablm.checkpoint.shards import Piece
from slablm.dense import loading, sources
from slablm.dense.conversion import by_own_names
from slablm.dense.targets import find_blocks
from slablm.errors import SlabError
from slablm.runtime.experts import separate_experts
from slablm.system.memory import mapped_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class DenseModel:
    """A model to compress.

    Attributes:
        model: all on the meta device, or as a whole on the compute device.
        tokenizer: the model's.
        files: what it is read from.
        weights: where each of its tensors lies; empty for a model that is in memory as a whole.
        whole_because: why that is so; empty for a streamed model.
        device: compute device.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    files: list[Path]
    weights: dict[str, Piece]
    whole_because: str
    device: torch.device


def open_dense(
    source: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    whole_because: str = "",
) -> DenseModel:
    """Find a model and read its headers; its tensors only if it cannot be streamed.

    Args:
        source: as for `slablm.dense.loading.load`.
        dtype: as for `slablm.dense.loading.load`.
        device: compute device.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run model code from the hub.
        whole_because: if not empty, why the caller needs the whole model in memory.

    Raises:
        SlabError: it cannot be found or read; a file or a tensor is missing.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    loading.check_device(device)
    where, gguf = loading.locate(source)
    files = [Path(where, gguf["gguf_file"])] if gguf else sources.model_files(where, revision)
    weights: dict[str, Piece] = {}
    if gguf:
        whole_because = "GGUF files are read as a whole"
    elif not files or sources.other_file_name(where):
        whole_because = "it has no safetensors files of its own"
    else:
        weights = sources.open_weights(files, where, revision)
    if not whole_because:
        with loading.explained(source):
            model, weights, whole_because = _skeleton(where, dtype, weights, options)
    if not whole_because:
        from transformers import AutoTokenizer

        with loading.explained(source):
            tokenizer: Any = AutoTokenizer.from_pretrained(where, **options)
    else:
        weights = {}
        model, tokenizer = loading.load(source, dtype=dtype, device=device, **options)
    _move_constants(model, torch.device(device))
    return DenseModel(model, tokenizer, files, weights, whole_because, torch.device(device))


def _skeleton(
    where: str, dtype: str, weights: dict[str, Piece], options: dict[str, Any]
) -> tuple[Any, dict[str, Piece], str]:
    """The model without its weights as `from_pretrained` would set it up and its tensors, or why to read it as a whole.

    Raises:
        SlabError: see `by_own_names` and `why_whole`.
    """
    from transformers import AutoConfig, GenerationConfig

    wanted = loading.wanted_dtype(dtype, gguf=False)
    config = AutoConfig.from_pretrained(where, **options)
    if wanted == "auto":
        types = own_dtypes(config, weights)
        if len(types) != 1:
            return None, {}, "its config names no dtype and its files hold several"
        wanted = types[0]
    model = empty_model(config, wanted, trust_remote_code=options["trust_remote_code"])
    model.config.name_or_path = where
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(where, revision=options["revision"])
        except OSError:
            model.generation_config = GenerationConfig.from_pretrained(
                where, config_file_name="config.json", _from_model_config=True, revision=options["revision"]
            )
    weights = by_own_names(model, weights)
    return model, weights, why_whole(model, weights)


def own_dtypes(config: Any, weights: dict[str, Piece]) -> list[torch.dtype]:
    """The type that a model's config names; without one, those in its files, the first one in front."""
    if config.dtype is not None:
        return [config.dtype]
    return list(dict.fromkeys(t.dtype for t in map(Piece.meta, weights.values()) if t.is_floating_point()))


def empty_model(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model on the meta device, in eval mode, its experts apart; only buffers that no file holds have bytes.

    Args:
        config: transformers' config of the model.
        dtype: type of its weights.
        trust_remote_code: run model code from the hub.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    # Every weight exists for a moment, before it goes to the meta device.
    with mapped_apart(), init_empty_weights(include_buffers=False):
        build: Any = AutoModelForCausalLM.from_config
        model: PreTrainedModel = build(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    _keep_in_float32(model, dtype)
    separate_experts(model)
    model.tie_weights()  # the context above makes a tensor of its own for every name
    return model


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give tensors that transformers keeps in float32 that type, as `from_pretrained` does (routers of DeepSeek)."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    for name, tensor in model.state_dict().items():
        wider = next((wide for pattern, wide in plan.items() if re.search(pattern.replace("*", ".*"), name)), None)
        if wider is not None and tensor.is_floating_point():
            put(model, [name], tensor.to(wider))


def why_whole(model: PreTrainedModel, weights: dict[str, Piece]) -> str:
    """Why the files' tensors cannot just be put into the model under their names; empty if they can.

    Args:
        model: on the meta device.
        weights: where each tensor lies, from `by_own_names`.

    Raises:
        SlabError: a tensor is missing in the files, or has another shape than the model wants.
    """
    prefix, _ = find_blocks(model)
    missing = []
    for names in tensor_names(model):
        stored = [name for name in names if name in weights]
        if len(stored) > 1 or (len(names) > 1 and any(name.startswith(prefix + ".") for name in names)):
            return f"{' and '.join(names)} are tied"
        if not stored:
            missing.append(names[0])
    if missing and set(weights) - set(model.state_dict()):
        return "transformers changes the names of its tensors"
    if missing:
        raise SlabError(f"{model.config.name_or_path}: tensor {missing[0]!r} is missing, {WAY_OUT}")
    for name, tensor in model.state_dict().items():
        if name in weights and weights[name].shape != tuple(tensor.shape):
            raise SlabError(
                f"{model.config.name_or_path}: tensor {name!r} has shape {list(weights[name].shape)}, "
                f"the config asks for {list(tensor.shape)}: {WAY_OUT}"
            )
    return ""


def _move_constants(model: nn.Module, device: torch.device) -> None:
    """Put buffers that no file holds (rotary frequencies) onto the compute device."""
    stored = model.state_dict().keys()
    for name, buffer in list(model.named_buffers()):
        if name not in stored:
            put(model, [name], buffer.to(device))


def tensor_names(model: nn.Module) -> list[list[str]]:
    """Names of the model's stored tensors; those of one tied tensor together, the one that is stored in front."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    state: Any = {name: None for names in groups.values() for name in names[:1] if len(names) == 1}
    tied = {name: torch.empty(1, device="meta") for names in groups.values() if len(names) > 1 for name in names}
    first = set(remove_tied_weights_from_state_dict(tied, model)) | set(state)  # type: ignore[arg-type]
    return [sorted(names, key=lambda name: name not in first) for names in groups.values()]


def is_parameter(model: nn.Module, name: str) -> bool:
    """Whether a name of the model's state is a parameter's; else it is a buffer's."""
    module, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(module)._parameters


def put(model: nn.Module, names: list[str], tensor: Tensor) -> None:
    """Make a tensor the parameter or buffer of these names (several if they are tied)."""
    parameter = nn.Parameter(tensor, requires_grad=False) if is_parameter(model, names[0]) else None
    for name in names:
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        if parameter is not None:
            owner._parameters[leaf] = parameter
        else:
            owner._buffers[leaf] = tensor
