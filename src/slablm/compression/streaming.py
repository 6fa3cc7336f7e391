"""A dense model of which only one block is in memory.

`open_dense` builds the model on the meta device, where a tensor has a shape and no bytes, from its config alone, and
finds out in which file every tensor lies. `StreamedBlocks` then hands the blocks to the loop in
`slablm.compression.blocks`, one at a time:

    load    read the block's tensors from the files onto the compute device
    finish  write what it has become into the journal, and put the block back on the meta device

What lies outside the blocks (embeddings, final norm, head) goes into the journal first, tensor by tensor. Of it the
decoder needs only its own part, and only once: for the inputs of the first block.

Values do not depend on this. The same reading, rounding and calibration happen as with a model that is in memory as a
whole, so the resulting files are the same, byte by byte. A model that cannot be streamed passes through here as well:
its blocks are in memory from the beginning and leave it one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slablm.calibration.activations import Activations
from slablm.checkpoint.layer_report import LayerReport
from slablm.checkpoint.shards import WAY_OUT, Piece
from slablm.compression.blocks import BlockStore, FinishedBlock, rounded
from slablm.compression.journal import Journal, block_key, outside_key
from slablm.config import CompressionConfig
from slablm.dense import loading, sources
from slablm.dense.targets import Targets, find_blocks
from slablm.errors import SlabError
from slablm.packing import PackedSpec
from slablm.system.finite import check_finite
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
            model, whole_because = _skeleton(where, dtype, weights, options)
    if not whole_because:
        from transformers import AutoTokenizer

        with loading.explained(source):
            tokenizer: Any = AutoTokenizer.from_pretrained(where, **options)
    else:
        weights = {}
        model, tokenizer = loading.load(source, dtype=dtype, device=device, **options)
    _move_constants(model, torch.device(device))
    return DenseModel(model, tokenizer, files, weights, whole_because, torch.device(device))


def _skeleton(where: str, dtype: str, weights: dict[str, Piece], options: dict[str, Any]) -> tuple[Any, str]:
    """The model without its weights as `from_pretrained` would set it up, or why it has to be read as a whole.

    Raises:
        SlabError: see `why_whole`.
    """
    from transformers import AutoConfig, GenerationConfig

    wanted = loading.wanted_dtype(dtype, gguf=False)
    config = AutoConfig.from_pretrained(where, **options)
    if wanted == "auto":
        types = own_dtypes(config, weights)
        if len(types) != 1:
            return None, "its config names no dtype and its files hold several"
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
    return model, why_whole(model, weights)


def own_dtypes(config: Any, weights: dict[str, Piece]) -> list[torch.dtype]:
    """The type that a model's config names; without one, those in its files, the first one in front."""
    if config.dtype is not None:
        return [config.dtype]
    return list(dict.fromkeys(t.dtype for t in map(Piece.meta, weights.values()) if t.is_floating_point()))


def empty_model(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model on the meta device, in eval mode; only buffers that no file holds have bytes.

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
    model.tie_weights()  # the context above makes a tensor of its own for every name
    return model


def why_whole(model: PreTrainedModel, weights: dict[str, Piece]) -> str:
    """Why the files' tensors cannot just be put into the model under their names; empty if they can.

    Args:
        model: on the meta device.
        weights: where each tensor lies.

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
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return "it mixes types"
    return ""


def _move_constants(model: nn.Module, device: torch.device) -> None:
    """Put buffers that no file holds (rotary frequencies) onto the compute device."""
    stored = model.state_dict().keys()
    for name, buffer in list(model.named_buffers()):
        if name not in stored:
            _put(model, [name], buffer.to(device))


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


class StreamedBlocks(BlockStore):
    """The blocks of a model, from its files into the journal.

    Args:
        dense: the model.
        targets: the layers to compress.
        config: the settings, `value_dtype` included.
        journal: where finished blocks go; None on a rank that does not write.
        max_activation_bytes: RAM for hidden states; None for as much as they take.
        folder: where hidden states beyond that go.
        done: blocks that an earlier run has finished.
    """

    def __init__(
        self,
        dense: DenseModel,
        targets: Targets,
        config: CompressionConfig,
        journal: Journal | None,
        *,
        max_activation_bytes: int | None,
        folder: Path | None,
        done: int,
    ) -> None:
        self.done = done
        self._dense, self._journal, self._folder = dense, journal, folder
        self._value_dtype: torch.dtype = getattr(torch, config.value_dtype or "")
        self._max_activation_bytes = max_activation_bytes
        self._compressed = {f"{name}.weight" for names in targets.names for name in names}
        self._prefix, self._blocks = find_blocks(dense.model)
        self._dtypes = {name: tensor.dtype for name, tensor in dense.model.state_dict().items()}
        self.names = tensor_names(dense.model)
        self._outside = [names for names in self.names if not names[0].startswith(f"{self._prefix}.")]
        self._loaded: int | None = None
        for index, names in enumerate(self._outside):
            if journal is not None and not journal.has(outside_key(index)):
                stored = self._stored(names[0], self._read(names))
                journal.put(outside_key(index), {names[0]: stored})

    def activations(self, count: int) -> Activations:
        """In RAM up to the limit, then in a file."""
        return Activations(count, self._max_activation_bytes, self._folder)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Within it, the decoder's embeddings and norms are in memory; nothing outside the blocks is, afterwards."""
        model = self._dense.model
        decoder: nn.Module = getattr(model, "base_model", model)
        needed = {id(tensor) for tensor in decoder.state_dict(keep_vars=True).values()}
        present = model.state_dict(keep_vars=True)
        for index, names in enumerate(self._outside):
            if id(present[names[0]]) in needed:
                tensor = self._outside_tensor(index)
                _put(model, names, tensor.to(self._dense.device, self._dtypes[names[0]]))
        yield
        for names in self._outside:
            _put(model, names, model.state_dict()[names[0]].to("meta"))

    def _outside_tensor(self, index: int) -> Tensor:
        """As it will be stored; a rank that does not write reads it from the model's files once more."""
        name = self._outside[index][0]
        if self._journal is None:
            return self._stored(name, self._read(self._outside[index]))
        return self._journal.pieces(outside_key(index))[name].read()

    def load(self, index: int) -> None:
        """Read a block's tensors; the block loaded before is dropped."""
        if index == self._loaded or not self._dense.weights:
            return
        if self._loaded is not None:
            self._release(self._loaded)
        self._loaded = index
        for name in self._blocks[index].state_dict(prefix=self._name(index)):
            tensor = self._read([name]).to(self._dense.device)
            _put(self._dense.model, [name], tensor)

    def finished(self, index: int) -> FinishedBlock:
        """A block from the journal, its packed weights on the compute device."""
        assert self._journal is not None
        pieces, notes = self._journal.pieces(block_key(index)), self._journal.notes(block_key(index))
        reports = [LayerReport(**{**entry, "shape": tuple(entry["shape"])}) for entry in notes]
        packed = {}
        for report in reports:
            part = {key: piece for key, piece in pieces.items() if key.startswith(f"{report.name}.")}
            read = {
                key.removeprefix(f"{report.name}."): piece.read().to(self._dense.device) for key, piece in part.items()
            }
            packed[report.name] = _spec(report, read).from_parts(read, report.name)
        return FinishedBlock(packed, reports)

    def finish(self, index: int, block: FinishedBlock) -> None:
        """Write a block into the journal, if there is one and the block is not in it, and drop the block."""
        if self._journal is not None and index >= self.done:
            state = self._blocks[index].state_dict(prefix=self._name(index))
            tensors = {name: self._stored(name, tensor) for name, tensor in state.items()}
            self._journal.put(block_key(index), tensors, [vars(report) for report in block.reports])
        self._release(index)
        self._loaded = None

    def _name(self, index: int) -> str:
        return f"{self._prefix}.{index}."

    def _read(self, names: list[str]) -> Tensor:
        """A tensor of the dense model, rounded as it will be stored if it stays dense; on the CPU if streamed."""
        model, name = self._dense.model, names[0]
        if not self._dense.weights:  # checked and rounded already
            whole: Tensor = model.state_dict()[name]
            return whole
        tensor = next(self._dense.weights[n] for n in names if n in self._dense.weights).read()
        tensor = tensor.to(self._dtypes[name])
        if _is_parameter(model, name):
            check_finite(tensor, name)
            if name not in self._compressed:
                tensor = rounded(tensor, name, self._value_dtype)
        return tensor

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        from slablm.checkpoint.hf import stored_form

        return stored_form(tensor, self._value_dtype).cpu()

    def _release(self, index: int) -> None:
        """Put a block on the meta device."""
        for name, tensor in self._blocks[index].state_dict(prefix=self._name(index)).items():
            _put(self._dense.model, [name], tensor.to("meta"))


def _spec(report: LayerReport, parts: dict[str, Tensor]) -> PackedSpec:
    """What the packed parts of a layer are."""
    (m, n), left, coded = report.shape, parts["left"], report.group_size is not None
    kept, bits = round(report.kept_fraction * n), report.value_bits if coded else None
    return PackedSpec(m, n, kept, left.shape[1], coded or "states" in parts, left.dtype, bits, report.group_size)


def _is_parameter(model: nn.Module, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(module)._parameters


def _put(model: nn.Module, names: list[str], tensor: Tensor) -> None:
    """Make a tensor the parameter or buffer of these names (several if they are tied)."""
    parameter = nn.Parameter(tensor, requires_grad=False) if _is_parameter(model, names[0]) else None
    for name in names:
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        if parameter is not None:
            owner._parameters[leaf] = parameter
        else:
            owner._buffers[leaf] = tensor
