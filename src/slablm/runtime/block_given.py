"""What a model calls its decoder blocks with, and whether the kernels can read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slablm.runtime.kernels.block import FLOAT_TYPES, BlockShape

# What models pass that changes nothing for one token beside what is used here. Nor does anything that is None or False.
_KNOWN = frozenset(
    ("attention_mask", "cache", "cache_position", "past_key_values", "position_embeddings", "position_ids", "use_cache")
)


@dataclass(frozen=True)
class Given:
    """What a block is called with, beside its inputs.

    Attributes:
        rotary: cosines and sines.
        mask: attention mask, or None.
        cache: of keys and values.
    """

    rotary: Any
    mask: Any
    cache: Any

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> Given | None:
        """None if more is asked for than is used here."""
        others = kwargs.keys() - _KNOWN
        if any(kwargs[name] is not None and kwargs[name] is not False for name in others):
            return None
        cache = kwargs.get("cache")
        cache = kwargs.get("past_key_values") if cache is None else cache
        return cls(kwargs.get("position_embeddings"), kwargs.get("attention_mask"), cache)

    def suits(self, hidden_states: Tensor, shape: BlockShape) -> bool:
        """Whether kernels can read inputs [sequences, tokens, hidden] and positions."""
        if self.rotary is None:
            return False
        (sequences, tokens, width), (cosines, sines) = hidden_states.shape, self.rotary
        if width != shape.hidden or cosines.shape != sines.shape or cosines.dtype != sines.dtype:
            return False
        turned = cosines.shape[-1]
        if cosines.shape not in ((1, tokens, turned), (sequences, tokens, turned)) or turned > shape.head_dim:
            return False
        return _is_plain(hidden_states) and _is_plain(cosines) and _is_plain(sines)

    def has_readable_mask(self, sequences: int, tokens: int, count: int) -> bool:
        """Whether it is [sequences or 1, 1, tokens, all tokens] bool, where True is attention, or none."""
        mask = self.mask
        if mask is None:
            return True
        plain = type(mask) is Tensor and mask.dtype == torch.bool and mask.is_cpu
        return plain and mask.shape in ((sequences, 1, tokens, count), (1, 1, tokens, count))

    def contiguous_mask(self) -> Tensor | None:
        """A readable mask as the kernels read it."""
        return None if self.mask is None else self.mask.contiguous()


def are_readable(keys: Tensor, values: Tensor) -> bool:
    """Whether kernels can read the keys and values of a cache."""
    same = keys.dtype == values.dtype and keys.shape == values.shape
    return same and keys.is_cpu and values.is_cpu and keys.dtype in FLOAT_TYPES


def _is_plain(tensor: Tensor) -> bool:
    plain = type(tensor) is Tensor and tensor.is_cpu and tensor.is_contiguous()
    return plain and tensor.dtype in FLOAT_TYPES
