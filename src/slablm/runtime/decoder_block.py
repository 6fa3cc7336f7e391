"""Which decoder blocks of transformers the kernels can run as a whole, and their parts.

Known are classes whose forward is what `slablm.runtime.kernels.block` says. The names of their parts tell the variants
apart: norms of queries and keys, norms behind attention and MLP (Gemma 3), one weight for q, k and v and one for gate
and up (Phi-3).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from operator import contains, is_
from typing import Any

from torch import Tensor, nn

from slablm.runtime.kernels import block as kernel
from slablm.runtime.linear import SlabLinear, SymbolLinear

_CLASSES = frozenset(
    name + "DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma3", "Phi3")
)
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Implementations of attention that compute what the kernels do; another one may do anything.
_ATTENTION = ("sdpa", "eager")

_Part = nn.Module | None


class DecoderBlock:
    """The parts of a decoder block, wherever its tensors are.

    Args:
        layer: of a known class.

    Attributes:
        index: of the block, and of its layer in a cache.
        shape: sizes.
        modules, hooks, buffers: dictionaries of the parts' children, hooks and buffers.
        children: that there were in `modules`.
        packed: layers in symbols.
        plain: all other parts.
        floats: where norms and biases are.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._config, self._is_causal = attention.config, getattr(attention, "is_causal", True)
        self.index: int = attention.layer_idx
        self.shape = kernel.BlockShape(
            hidden=self._config.hidden_size,
            intermediate=self._config.intermediate_size,
            heads=self._config.num_attention_heads,
            kv_heads=self._config.num_key_value_heads,
            head_dim=attention.head_dim,
            activation=_ACTIVATIONS[_activation(self._config)],
            scaling=attention.scaling,
        )
        behind = hasattr(layer, "post_feedforward_layernorm")
        self._norms: tuple[_Part, ...] = (
            layer.input_layernorm,
            layer.post_attention_layernorm if behind else None,
            layer.pre_feedforward_layernorm if behind else layer.post_attention_layernorm,
            layer.post_feedforward_layernorm if behind else None,
            getattr(attention, "q_norm", None),
            getattr(attention, "k_norm", None),
        )
        self._linears: tuple[_Part, ...] = (
            *_either(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")),
            attention.o_proj,
            *_either(mlp, "gate_up_proj", ("gate_proj", "up_proj")),
            mlp.down_proj,
        )
        # Gemma's norms multiply with 1 + weight.
        self._offset = 1.0 if type(layer).__name__.startswith("Gemma") else 0.0
        # Whoever replaces a part, hooks into it or gives it another forward wants it to be called.
        modules = list(layer.modules())
        self.modules = [part._modules for part in modules if part._modules]
        self.children = [child for children in self.modules for child in children.values()]
        self.hooks = [hooks for part in modules[1:] for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self.plain = [part for part in modules[1:] if not isinstance(part, SymbolLinear)]
        self.packed = [part for part in self._linears if part is not None]
        self.buffers = [part._buffers for part in self.packed]
        self.floats: list[tuple[dict[str, Any], str]] = [
            *((part._parameters, "bias") for part in self.packed if part._parameters.get("bias") is not None),
            *((part._parameters, "weight") for part in self._norms if part is not None),
        ]

    @property
    def fits(self) -> bool:
        """Whether kernels have been written for its layers and sizes."""
        sizes = (self.shape.hidden, self.shape.intermediate, self.shape.head_dim)
        known = all(part is None or type(part) is SymbolLinear for part in self._linears)
        return known and all(size % kernel.LANES == 0 for size in sizes)

    @property
    def has_known_attention(self) -> bool:
        """Whether its implementation of attention computes what the kernels do."""
        return self._config._attn_implementation in _ATTENTION

    @property
    def sees_the_past(self) -> bool:
        """Whether its tokens see those up to themselves where there is no mask: so sdpa is called, and nothing else."""
        return self._is_causal and self._config._attn_implementation == "sdpa"

    def may_follow(self, other: DecoderBlock) -> bool:
        """Whether what is known of another block's attention and inputs is known of its own.

        Args:
            other: a block of the same model.
        """
        return self._config is other._config and self.shape.head_dim == other.shape.head_dim

    def describe(self) -> bytes:
        """What the kernels read, as long as nothing moves."""
        norms = [self._norm(part) for part in self._norms]
        return kernel.describe(self.shape, norms, [_projection(part) for part in self._linears])

    def _norm(self, part: Any) -> kernel.Norm:
        if part is None:
            return kernel.Norm()
        epsilon = part.eps if hasattr(part, "eps") else part.variance_epsilon
        return kernel.Norm(part.weight, self._offset, epsilon)


class Watch:
    """Blocks whose description is known as long as nothing happens to any of them.

    It is asked for every token, and what it looks at has left the CPU's caches since: so that is as little as can be,
    in lists over all blocks that are gone through without a step of Python's. Layers in symbols count what happens to
    them, so that their buffers need only be the same tensors.

    Args:
        blocks: one behind the other.
    """

    def __init__(self, blocks: Sequence[DecoderBlock]) -> None:
        self._blocks = blocks
        self._modules, self._children, self._hooks, self._plain, self._buffers, floats = (
            [kept for block in blocks for kept in getattr(block, name)]
            for name in ("modules", "children", "hooks", "plain", "buffers", "floats")
        )
        self._places, self._names = [place for place, _ in floats], [name for _, name in floats]
        self._changes = -1
        self._addresses: list[Any] = []
        self._known: list[Any] = []
        self._memory: list[Any] = []  # so that it is there if somebody sets the `data` of a buffer, which goes unseen
        self._description: bytes | None = None

    def description(self) -> bytes | None:
        """For the kernels, one block behind the other; None while a part is not what it was or cannot be read."""
        if any(self._hooks) or any(map(contains, map(vars, self._plain), repeat("forward"))):
            return None
        if self._all(self._modules) != self._children:
            return None
        try:
            floats: list[Any] = [*map(dict.__getitem__, self._places, self._names)]
            addresses = [*map(Tensor.data_ptr, floats), *[tensor.dtype for tensor in floats]]
        except (KeyError, TypeError):  # it is computed, or there is none any more
            return None
        buffers, changes = self._all(self._buffers), SlabLinear.changes
        same = addresses == self._addresses and changes == self._changes and len(buffers) == len(self._known)
        if not same or not all(map(is_, buffers, self._known)):
            readable = self._is_readable([*floats, *buffers])
            self._description = b"".join(block.describe() for block in self._blocks) if readable else None
            self._memory = [buffer.untyped_storage() for buffer in buffers]
            self._addresses, self._known, self._changes = addresses, buffers, changes
        return self._description

    def _is_readable(self, tensors: list[Tensor]) -> bool:
        packed = [part for block in self._blocks for part in block.packed]
        layers = all(part.runs_native and "forward" not in vars(part) for part in packed)
        return layers and all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)

    @staticmethod
    def _all(dictionaries: list[dict[str, Any]]) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, dictionaries))]


def recognise(layer: nn.Module) -> DecoderBlock | None:
    """The parts of a block, or None if it is none that the kernels can run.

    Args:
        layer: any module.
    """
    kind = type(layer)
    if kind.__name__ not in _CLASSES or not kind.__module__.startswith("transformers.models."):
        return None
    if _activation(layer.self_attn.config) not in _ACTIVATIONS:  # type: ignore[union-attr]
        return None
    block = DecoderBlock(layer)
    return block if block.fits else None


def _activation(config: Any) -> str:
    name: str = getattr(config, "hidden_activation", None) or config.hidden_act
    return name


def _either(module: nn.Module, joined: str, apart: tuple[str, ...]) -> tuple[_Part, ...]:
    """One layer for all, and nothing in place of the others; or each of them."""
    if hasattr(module, joined):
        return getattr(module, joined), *(None,) * (len(apart) - 1)
    return tuple(getattr(module, name) for name in apart)


def _projection(part: Any) -> kernel.Projection:
    return kernel.Projection() if part is None else kernel.Projection(part.packed, part.bias)
