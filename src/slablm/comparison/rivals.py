"""Rivals: files in which somebody else has compressed the same model, measured on the same tokens.

A rival is a GGUF file, whatever number formats are in it, or a folder that transformers opens. Three things make the
comparison a fair one:

1. *The same model.* Layer for layer it has the dense model's shapes. Of a GGUF file only the tensors are taken; what
   else the function depends on (rotary frequencies, windows of attention, the norm's ε) comes from the dense model, as
   transformers reads only a part of it from the file.
2. *The same weights are counted.* With T the target layers (`slablm.dense.targets`) of the dense model, out × in each,

       bits per weight = 8 · Σ_{t ∈ T} bytes(t) / Σ_{t ∈ T} out(t) · in(t),

   where bytes(t) are those in the file of all tensors of layer t but its bias: codes, scales, zero points, tables. Not
   counted are headers, what aligns tensors, and the vocabulary, as with our own methods in the same table. Nothing is
   concluded from the name of a file or a format: llama.cpp, for one, stores a layer whose width is no multiple of 256
   in a larger type than it was asked for.
3. *What is not counted is stated.* A rival may have other embeddings than the dense model, and the head; it is measured
   with them, and `embedding_size` says what they take.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from slablm.checkpoint.files import CONFIG, weight_files
from slablm.checkpoint.inspection import inspect_folder
from slablm.checkpoint.shards import TensorFile
from slablm.dense import loading
from slablm.dense.gguf_header import Header, read_header
from slablm.dense.opening import empty_model
from slablm.dense.targets import find_blocks
from slablm.errors import SlabError
from slablm.methods import METHODS
from slablm.runtime.experts import separate_experts
from slablm.runtime.replace_module import unpack_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE = "dense"
_GGUF = ".gguf"
_CHUNK = 1 << 22
_SAME_MODEL = "a rival has to be made from the model it is compared with"


@dataclass(frozen=True)
class Rival:
    """A compressed model that was made elsewhere.

    Attributes:
        name: what tables call it.
        path: a GGUF file or a folder.
    """

    name: str
    path: Path

    @classmethod
    def parse(cls, argument: str) -> Rival:
        """From what a user types, ``NAME=PATH``.

        Raises:
            SlabError: it is nothing like that, the name is taken, or nothing usable is at the path.
        """
        name, equals, place = (part.strip() for part in argument.partition("="))
        if not equals or not name or not place:
            raise SlabError(f"rival {argument!r} is not understood: write NAME=PATH, such as IQ4_NL=model-iq4_nl.gguf")
        if name in METHODS or name == DENSE:
            raise SlabError(f"rival {argument!r} has the name of a method of the table: choose another one than {name}")
        path = Path(place).expanduser()
        if not path.exists():
            raise SlabError(f"rival {name}: {path} does not exist; hub models have to be downloaded before")
        if not path.is_dir() and path.suffix != _GGUF:
            raise SlabError(f"rival {name}: {path} is neither a folder nor a {_GGUF} file")
        return cls(name, path)

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file; else a folder."""
        return not self.path.is_dir()


@dataclass(frozen=True)
class Size:
    """What weights take.

    Attributes:
        nbytes: bytes in the file.
        weights: number of weights, of the dense model.
    """

    nbytes: int
    weights: int

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight."""
        return 8 * self.nbytes / self.weights


def parse_all(arguments: Iterable[str]) -> tuple[Rival, ...]:
    """The rivals of a command line.

    Args:
        arguments: ``NAME=PATH`` each.

    Raises:
        SlabError: see `Rival.parse`; or two have one name.
    """
    rivals = tuple(map(Rival.parse, arguments))
    for index, rival in enumerate(rivals):
        if rival.name in {other.name for other in rivals[:index]}:
            raise SlabError(f"two rivals are called {rival.name}: give each a name of its own")
    return rivals


def digest(rival: Rival) -> str:
    """Digest of all that decides a rival's numbers, 16 hexadecimal digits; where it lies does not matter.

    Raises:
        SlabError: a file of it is missing or cannot be read.
    """
    hasher = hashlib.blake2b(digest_size=8)
    files = [rival.path] if rival.is_gguf else [rival.path / CONFIG, *weight_files(rival.path)]
    try:
        for file in files:
            hasher.update(f"{'' if rival.is_gguf else file.name} {file.stat().st_size}\n".encode())
            for chunk in _chunks(file):
                hasher.update(chunk)
    except OSError as error:
        raise SlabError(f"rival {rival.name}: {error.filename} cannot be read: {error.strerror}") from error
    return hasher.hexdigest()


def load(rival: Rival, like: PreTrainedModel) -> PreTrainedModel:
    """Load a rival, its layers dequantised where that can be.

    Args:
        rival: what to load.
        like: the dense model; the rival gets its dtype and device.

    Raises:
        SlabError: it cannot be loaded, or is not the same model.
    """
    dtype = str(like.dtype).removeprefix("torch.")
    model, _ = loading.load(str(rival.path), dtype=dtype, device=str(like.device))
    unpack_layers(model, model.dtype)
    separate_experts(model)  # as targets are selected in the dense model
    if difference := _difference(model, like):
        raise SlabError(f"rival {rival.name}: {difference}: {_SAME_MODEL}")
    return _with_settings_of(like, model, rival) if rival.is_gguf else model


def true_bits(rival: Rival, like: PreTrainedModel, targets: Iterable[str]) -> Size:
    """What the target layers take in a rival's file; the module docstring says what is counted.

    Args:
        rival: what to measure; only headers are read, of a slablm folder everything.
        like: the dense model.
        targets: full names of its target layers.

    Raises:
        SlabError: the file cannot be read, or holds nothing under the name of a layer.
    """
    names = list(targets)
    stored = _stored_bytes(rival, like)
    for name in names:
        if not stored.get(name):
            raise SlabError(f"rival {rival.name}: {rival.path} holds no tensor of layer {name}: {_SAME_MODEL}")
    weights = sum(_weight(like.get_submodule(name)).numel() for name in names)
    return Size(sum(stored[name] for name in names), weights)


def embedding_size(rival: Rival, like: PreTrainedModel) -> Size:
    """What embeddings and head take in a rival's file; a table that both share counts once, in bytes and weights.

    Args:
        rival: as in `true_bits`.
        like: the dense model.

    Raises:
        SlabError: the file cannot be read.
    """
    head: nn.Module | None = like.get_output_embeddings()  # type: ignore[no-untyped-call]
    ends = [like.get_input_embeddings(), *([] if head is None else [head])]
    names = [name for name, module in like.named_modules() if any(module is end for end in ends)]
    stored = _stored_bytes(rival, like)
    tables = {id(weight): weight.numel() for weight in map(_weight, ends)}
    return Size(sum(stored.get(name, 0) for name in names), sum(tables.values()))


def whole_size(rival: Rival, like: PreTrainedModel) -> Size:
    """What all tensors take in a rival's file; the vocabulary of a GGUF file is none.

    Args:
        rival: as in `true_bits`.
        like: the dense model, whose weights count, each once.

    Raises:
        SlabError: the file cannot be read.
    """
    weights = sum(parameter.numel() for parameter in like.parameters())
    if rival.is_gguf:
        return Size(sum(tensor.nbytes for tensor in _header(rival).tensors), weights)
    pieces = [piece for file in weight_files(rival.path) for piece in TensorFile.open(file).pieces.values()]
    return Size(sum(piece.nbytes for piece in pieces), weights)


def _weight(module: nn.Module) -> nn.Parameter:
    """A module's weight, [out, in] or [vocabulary, width]."""
    weight: Any = module.weight
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            yield chunk


def _stored_bytes(rival: Rival, like: PreTrainedModel) -> dict[str, int]:
    """Bytes in the file by the full name of the dense model's module they belong to, biases left out."""
    names = [name for name, module in like.named_modules() if any(True for _ in module.parameters(recurse=False))]
    if rival.is_gguf:
        return _gguf_bytes(rival, names, len(find_blocks(like)[1]))
    pieces = {name: piece.nbytes for f in weight_files(rival.path) for name, piece in TensorFile.open(f).pieces.items()}
    stored = _by_module(pieces, {name: name for name in names})
    if loading.is_compressed(str(rival.path)):
        stored |= {layer.name: layer.true_bits // 8 for layer in inspect_folder(rival.path).layers}
    return stored


def _gguf_bytes(rival: Rival, names: list[str], blocks: int) -> dict[str, int]:
    """As `_stored_bytes`, for a GGUF file, in which tensors have other names."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    header = _header(rival)
    known = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
    if header.architecture not in known:
        raise SlabError(f"rival {rival.name}: the gguf package does not know architecture {header.architecture!r}")
    own_names = get_tensor_name_map(known[header.architecture], blocks)
    there = {name: own for name in names if (own := own_names.get_name(name))}
    return _by_module({tensor.name: tensor.nbytes for tensor in header.tensors}, there)


def _header(rival: Rival) -> Header:
    try:
        return read_header(rival.path)
    except (OSError, ValueError) as error:
        raise SlabError(f"rival {rival.name}: {error}") from error


def _by_module(tensors: dict[str, int], there: dict[str, str]) -> dict[str, int]:
    """Sum up the bytes of tensors.

    Args:
        tensors: bytes by name.
        there: what a module is called in the tensors' names, by its full name.
    """
    modules = {own: name for name, own in there.items()}
    stored: dict[str, int] = {}
    for tensor, nbytes in tensors.items():
        owner, _, leaf = tensor.rpartition(".")
        # A layer's tensors may have parts of their own: `….q_proj.weight.quant_state`.
        while owner and owner not in modules:
            owner = owner.rpartition(".")[0]
        if owner and leaf != "bias":
            stored[modules[owner]] = stored.get(modules[owner], 0) + nbytes
    return stored


def _difference(model: PreTrainedModel, like: PreTrainedModel) -> str:
    """What keeps a model from being the dense one in other numbers; empty if nothing does."""
    theirs, own = (_embeddings(m) for m in (model, like))
    if theirs != own:
        return f"its vocabulary has {theirs} tokens, the dense model's {own}"
    there, here = dict(_shapes(model)), dict(_shapes(like))
    for name in {**here, **there}:
        if name not in there:
            return f"it has no {name}, which the dense model has"
        if name not in here:
            return f"it has {name}, which the dense model does not have"
        if there[name] != here[name]:
            return f"{name} has shape {list(there[name])}, in the dense model {list(here[name])}"
    return ""


def _embeddings(model: PreTrainedModel) -> int:
    return int(_weight(model.get_input_embeddings()).shape[0])


def _shapes(module: nn.Module, name: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shapes of all parameters; of linear layers and embeddings, however they are held, one by the layer's name."""
    for sizes in (("out_features", "in_features"), ("num_embeddings", "embedding_dim")):
        if all(isinstance(getattr(module, size, None), int) for size in sizes):
            yield name, tuple(getattr(module, size) for size in sizes)
            return
    prefix = f"{name}." if name else ""
    for own, parameter in module.named_parameters(recurse=False):
        yield prefix + own, tuple(parameter.shape)
    for own, child in module.named_children():
        yield from _shapes(child, prefix + own)


def _with_settings_of(like: PreTrainedModel, model: PreTrainedModel, rival: Rival) -> PreTrainedModel:
    """The dense model with the tensors of another one, which may have a head of its own.

    Raises:
        SlabError: the other one lacks a tensor.
    """
    config = copy.deepcopy(like.config)
    config.tie_word_embeddings = model.config.tie_word_embeddings
    own = empty_model(config, model.dtype)  # in eval mode
    missing = own.load_state_dict(model.state_dict(), strict=False, assign=True).missing_keys
    if missing:
        raise SlabError(f"rival {rival.name}: transformers reads no {missing[0]} from its file: {_SAME_MODEL}")
    own.tie_weights()
    own.to(like.device)  # type: ignore[arg-type]
    return own
