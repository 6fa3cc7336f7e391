"""What all specs have in common: from the shapes and types of the parts follow bytes and buffers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class StoredSpec:
    """What is stored of a weight [m, n].

    Attributes:
        out_features: m.
        in_features: n.
    """

    out_features: int
    in_features: int

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor in a file, by name."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.parts().values())

    def empty(self, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Uninitialised parts."""
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in self.parts().items()}
