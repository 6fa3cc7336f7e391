"""Which decoder blocks of transformers the kernels can run as a whole, and their parts.

Known are classes whose forward is what `slablm.runtime.kernels.block` says. The names of their parts tell the variants
apart: norms of queries and keys, norms behind attention and MLP (Gemma 3), one weight for q, k and v and one for gate
and up (Phi-3).
"""

from __future__ import annotations

from itertools import chain
from operator import is_
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
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._config = attention.config
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
        self._children = [(module._modules, list(module._modules.values())) for module in modules if module._modules]
        self._hooks = [hooks for part in modules[1:] for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._plain = [part for part in modules[1:] if not isinstance(part, SymbolLinear)]
        self._packed = [part for part in self._linears if part is not None]
        self._kept = [part._buffers for part in self._packed]
        self._floats: list[tuple[dict[str, Any], str]] = [
            *((part._parameters, "bias") for part in self._packed if part._parameters.get("bias") is not None),
            *((part._parameters, "weight") for part in self._norms if part is not None),
        ]
        self._forget()

    def _forget(self) -> None:
        self._changes = -1
        self._addresses: list[Any] = []
        self._buffers: list[Any] = []
        self._memory: list[Any] = []  # so that it is there if somebody sets the `data` of a buffer, which goes unseen
        self._description: bytes | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies, and what comes from a file, have tensors elsewhere."""
        state = dict(vars(self))
        for name in ("_changes", "_addresses", "_buffers", "_memory", "_description"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        vars(self).update(state)
        self._forget()

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

    def may_follow(self, other: DecoderBlock) -> bool:
        """Whether what is known of another block's attention and inputs is known of its own.

        Args:
            other: a block of the same model.
        """
        return self._config is other._config and self.shape.head_dim == other.shape.head_dim

    def description(self) -> bytes | None:
        """For the kernels; None while a part is not what it was, or not where kernels can read it."""
        # For every block and token, and what is looked at has left the cache since: so as little as can be. Layers in
        # symbols count what happens to them, so that their buffers need only be the same tensors.
        if any(self._hooks) or not all(map(_is_intact, self._children)):
            return None
        if any("forward" in part.__dict__ for part in self._plain):
            return None
        try:
            floats = [place[name] for place, name in self._floats]
            addresses = [*map(Tensor.data_ptr, floats), *[tensor.dtype for tensor in floats]]
        except (KeyError, TypeError):  # it is computed, or there is none any more
            return None
        buffers: list[Any] = [*chain.from_iterable(map(dict.values, self._kept))]
        same = addresses == self._addresses and self._changes == SlabLinear.changes
        if not same or not all(map(is_, buffers, self._buffers)):
            changes = SlabLinear.changes
            self._description = self._described() if self._is_readable([*floats, *buffers]) else None
            self._memory = [buffer.untyped_storage() for buffer in buffers]
            self._addresses, self._buffers, self._changes = addresses, buffers, changes
        return self._description

    def _is_readable(self, tensors: list[Tensor]) -> bool:
        layers = all(part.runs_native and "forward" not in vars(part) for part in self._packed)
        return layers and all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)

    def _described(self) -> bytes:
        norms = [self._norm(part) for part in self._norms]
        return kernel.describe(self.shape, norms, [_projection(part) for part in self._linears])

    def _norm(self, part: Any) -> kernel.Norm:
        if part is None:
            return kernel.Norm()
        epsilon = part.eps if hasattr(part, "eps") else part.variance_epsilon
        return kernel.Norm(part.weight, self._offset, epsilon)


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


def _is_intact(part: tuple[dict[str, _Part], list[_Part]]) -> bool:
    children, known = part
    return list(children.values()) == known


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
