"""A compressed model as a GGUF file with dense weights, for llama.cpp and what is built on it.

The `gguf` package names the tensors; what llama.cpp wants besides is here: rows of q and k in its order, where two
numbers that rotate together are neighbours (Llama), and Gemma's gains with the 1 that it adds to them. Only for
architectures that were compared with llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slablm.checkpoint.save import staged
from slablm.checkpoint.shards import Piece
from slablm.errors import SlabError
from slablm.serving.export import Exported, compressed_bytes, dense_pieces, verified
from slablm.serving.gguf_vocabulary import WAY_OUT, add_vocabulary

# By `model_type` of config.json.
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
_KINDS = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
KINDS = tuple(_KINDS)
# What NumPy holds them as.
_NUMBERS = {
    gguf.GGMLQuantizationType.F32: "float32",
    gguf.GGMLQuantizationType.F16: "float16",
    gguf.GGMLQuantizationType.Q8_0: "uint8",
}


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: its name there, its type, and how it is made."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def data(self) -> NDArray[Any]:
        """The numbers as they are written.

        Raises:
            SlabError: one does not fit into 16 bits.
        """
        tensor = self.make().float()
        if self.kind is gguf.GGMLQuantizationType.F16:
            tensor = tensor.half()
            if not torch.isfinite(tensor).all():
                raise SlabError(f"{self.name}: a value does not fit into F16: use --gguf-type q8_0")
        if self.kind is gguf.GGMLQuantizationType.Q8_0:
            quantized: NDArray[Any] = gguf.quants.quantize(tensor.numpy(), self.kind)
            return quantized
        return tensor.contiguous().numpy()

    def announce(self, writer: gguf.GGUFWriter) -> int:
        """Tell a writer of the tensor; its bytes."""
        shape = self.shape
        if self.kind is gguf.GGMLQuantizationType.Q8_0:
            shape = gguf.quant_shape_to_byte_shape(shape, self.kind)
        numbers: np.dtype[Any] = np.dtype(_NUMBERS[self.kind])
        count = math.prod(shape) * numbers.itemsize
        writer.add_tensor_info(self.name, shape, numbers, count, raw_dtype=self.kind)
        return count


def export_gguf(source: Path, out: Path, kind: str = "f16", *, overwrite: bool = False) -> Exported:
    """Write a GGUF file.

    Args:
        source: a folder compressed by slablm.
        out: the folder that it is written to, under the name of `source` and the type.
        kind: of the matrices: ``f16``, or ``q8_0``, which rounds once more.
        overwrite: whether a file of that name may be replaced.

    Raises:
        SlabError: `source` is none or damaged, or has an architecture or a tokenizer that llama.cpp would not read as
            it is; the file exists; the disk is full. Nothing is left behind.
    """
    from transformers import AutoConfig

    if kind not in _KINDS:
        raise SlabError(f"gguf_type must be one of {', '.join(KINDS)}, got {kind!r}")
    if out.is_file():
        raise SlabError(f"{out} is a file, a folder is needed")
    path = out / f"{source.resolve().name}-{kind}.gguf"
    if path.exists() and not overwrite:
        raise SlabError(f"{path} exists: choose another folder or give --overwrite")
    checkpoint = verified(source)
    config = AutoConfig.from_pretrained(source)
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise SlabError(
            f"architecture {config.model_type!r} cannot be written as GGUF here, {', '.join(ARCHITECTURES)} can: "
            f"{WAY_OUT}"
        )
    entries = _entries(dense_pieces(checkpoint, torch.float32), config, architecture, _KINDS[kind][0])
    with staged(out) as folder:
        writer = gguf.GGUFWriter(folder / path.name, gguf.MODEL_ARCH_NAMES[architecture])
        writer.add_name(source.resolve().name)
        _add_sizes(writer, config)
        add_vocabulary(writer, source, config.vocab_size)
        writer.add_file_type(_KINDS[kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        count = sum(entry.announce(writer) for entry in entries)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.data())
        writer.close()
    return Exported(path, count, compressed_bytes(checkpoint))


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows of q or k, [heads · 2 · d, …]: i and i + d of a head, which rotate together, become neighbours."""
    of_heads = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return of_heads.transpose(1, 2).reshape(rows.shape).contiguous()


def _entries(
    pieces: dict[str, Piece], config: Any, architecture: gguf.MODEL_ARCH, kind: gguf.GGMLQuantizationType
) -> list[_Entry]:
    """The file's tensors, from the model's.

    Raises:
        SlabError: the model has one that llama.cpp has no name for.
    """
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    entries = []
    for own, piece in pieces.items():
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise SlabError(f"llama.cpp has no name for the tensor {own}: {WAY_OUT}")
        wanted = kind if len(piece.shape) > 1 else gguf.GGMLQuantizationType.F32
        if wanted is gguf.GGMLQuantizationType.Q8_0 and piece.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
            wanted = gguf.GGMLQuantizationType.F16
        entries.append(_Entry(name, wanted, piece.shape, _rearranging(piece, name, config, architecture)))
    factors = _rotation_factors(config)
    if factors is not None:
        entries.append(
            _Entry("rope_freqs.weight", gguf.GGMLQuantizationType.F32, tuple(factors.shape), lambda: factors)
        )
    return entries


def _rearranging(piece: Piece, name: str, config: Any, architecture: gguf.MODEL_ARCH) -> Callable[[], Tensor]:
    """How llama.cpp wants a tensor."""
    part = name.split(".")[-2]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part)
    if architecture is gguf.MODEL_ARCH.LLAMA and heads is not None:
        return lambda: interleaved(piece.read(), heads)
    if architecture is gguf.MODEL_ARCH.GEMMA3 and part.endswith("norm"):
        return lambda: piece.read().float() + 1
    return piece.read


def _rotation(config: Any) -> dict[str, Any]:
    """Settings of the rotary embedding; of Gemma's two kinds of layers those that look at everything."""
    parameters = config.rope_parameters
    return dict(parameters.get("full_attention", parameters))


def _rotation_factors(config: Any) -> Tensor | None:
    """By what Llama 3 divides its frequencies, [head_dim / 2]; None where nothing does.

    Raises:
        SlabError: they are scaled in another way.
    """
    rotation = _rotation(config)
    kind = rotation.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise SlabError(f"rotary embeddings of type {kind!r} cannot be written as GGUF here: {WAY_OUT}")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    plain: Tensor = rotation["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
    factors: Tensor = plain / scaled
    return factors


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rotation(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
