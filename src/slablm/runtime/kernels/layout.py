"""Runtime layout: a packed weight, laid out for the CPU kernels.

The file's ternary states, five to a byte, are compact but have to be divided out. At load they become bits: one *plane*
says which positions are kept, one which of the others are negative. A word of 64 columns is then an expand mask, its
population count tells how many values it takes, and nothing has to be decoded. This costs 2 bits per weight in memory
instead of 1.6 on disk; the values stay as they are (16 bits) or are quantized (8 bits, `slablm.packing.quantize`).

    planes[i, w, 0]  bit b: entry (i, 64 w + b) is kept
    planes[i, w, 1]  bit b: it is −Σ u v; never set where kept
    values           rows one after the other, then 64 bytes that kernels may read and ignore
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from slablm.errors import SlabError
from slablm.packing import PackedWeight
from slablm.packing.planes import unpack_bits, unpack_states
from slablm.runtime.kernels.runtime_weight import (
    RuntimeWeight,
    check_value_bits,
    values_and_scales,
    wide_factors,
)

WORD_BITS = 64
PADDING_BYTES = 64

# Weights whose states are unpacked at the same time, so that the peak while loading stays small.
_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class NativeWeight(RuntimeWeight):
    """A weight [m, n] in runtime layout; made by `to_native`, which checks what the kernels rely on.

    Attributes:
        in_features: n.
        values: m·k values and the padding, one-dimensional, float16, bfloat16 or int8.
        scales: [m] float32 for int8 values, else None.
        planes: [m, ⌈n / 64⌉, 1 or 2] int64: positions, and signs if there are any.
        left: u, [m, r] float32.
        right: vᵀ, [r, 64 ⌈n / 64⌉] float32, filled up with 0.
    """

    in_features: int
    values: Tensor
    scales: Tensor | None
    planes: Tensor
    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        """Refuse shapes and types that a kernel would misread."""
        m, words = self.planes.shape[0], -(-self.in_features // WORD_BITS)
        rank = self.left.shape[1]
        expected: tuple[tuple[Tensor | None, torch.dtype, tuple[int, ...]], ...] = (
            (self.values, self.values.dtype, (m * self.kept + self.padding,)),
            (self.planes, torch.int64, (m, words, self.planes.shape[2])),
            (self.left, torch.float32, (m, rank)),
            (self.right, torch.float32, (rank, words * WORD_BITS)),
            (self.scales, torch.float32, (m,)),
        )
        for tensor, dtype, shape in expected:
            if tensor is None:
                continue
            if tensor.device.type != "cpu":
                raise SlabError(
                    f"a weight that is laid out for the CPU cannot be on {tensor.device}: load the model with a "
                    "device_map, or call use_packed() before a layer's buffers are moved one by one"
                )
            if (tensor.dtype, tensor.shape, tensor.is_contiguous()) != (dtype, shape, True):
                raise SlabError(
                    f"not a runtime weight: {dtype} {list(shape)} expected, got {tensor.dtype} {list(tensor.shape)}"
                )
        if self.values.dtype not in (torch.float16, torch.bfloat16) and (
            self.values.dtype != torch.int8 or self.scales is None
        ):
            raise SlabError(f"not a runtime weight: values of type {self.values.dtype}")
        if self.values.dtype != torch.int8 and self.scales is not None:
            raise SlabError("not a runtime weight: scales beside 16-bit values")
        if self.planes.shape[2] not in (1, 2):
            raise SlabError(f"not a runtime weight: {self.planes.shape[2]} planes")

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """What the operator takes: all fields but n, in order."""
        return self.values, self.scales, self.planes, self.left, self.right

    @property
    def padding(self) -> int:
        """Values behind the last one."""
        return PADDING_BYTES // self.values.element_size()

    def masks(self, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        """As `RuntimeWeight.masks`."""
        planes, n = self.planes[begin:end], self.in_features
        return _mask(planes[:, :, 0], n), _mask(planes[:, :, 1], n) if self.signs else None


def to_native(packed: PackedWeight, value_bits: int = 16, name: str = "weight") -> NativeWeight:
    """Lay a packed weight out for the kernels.

    Args:
        packed: on the CPU.
        value_bits: 16 keeps the stored values, 8 quantizes them.
        name: how errors call this weight.

    Raises:
        SlabError: a corrupted plane, a row that does not keep k entries, or an unknown `value_bits`.
    """
    check_value_bits(value_bits)
    packed.validate(name)
    planes = _planes(packed)
    _check_kept(planes, packed.values.shape[1], name)
    values, scales = values_and_scales(packed, value_bits, 8 * PADDING_BYTES // value_bits)
    left, right = wide_factors(packed, WORD_BITS)
    return NativeWeight(packed.in_features, values, scales, planes, left, right)


def _planes(packed: PackedWeight) -> Tensor:
    """Bit planes of the states, [m, words, 1 or 2] int64, unpacked a few rows at a time."""
    m, n = packed.values.shape[0], packed.in_features
    planes = torch.zeros(m, -(-n // WORD_BITS), 2 if packed.signs else 1, dtype=torch.int64, device="cpu")
    step = max(1, _WEIGHTS_AT_ONCE // n)
    for begin in range(0, m, step):
        rows = slice(begin, begin + step)
        if packed.signs:
            factor = unpack_states(packed.plane[rows], n)
            planes[rows, :, 0], planes[rows, :, 1] = _words(factor == 0), _words(factor < 0)
        else:
            planes[rows, :, 0] = _words(unpack_bits(packed.plane[rows], n))
    return planes


def _words(mask: Tensor) -> Tensor:
    """[m, n] bool → [m, ⌈n / 64⌉] int64, bit b of word w is column 64 w + b."""
    padded = functional.pad(mask, (0, -mask.shape[1] % WORD_BITS))
    return torch.from_numpy(np.packbits(padded.numpy(), axis=1, bitorder="little").view("<i8"))


def _mask(words: Tensor, n: int) -> Tensor:
    """Inverse of `_words`."""
    octets = np.ascontiguousarray(words.numpy()).view(np.uint8)
    return torch.from_numpy(np.unpackbits(octets, axis=1, count=n, bitorder="little")).bool()


def _check_kept(planes: Tensor, kept: int, name: str) -> None:
    """Every row must take exactly its own values: the kernels read on until the bits end."""
    counts = np.bitwise_count(planes[:, :, 0].numpy().view(np.uint64)).sum(axis=1)
    if len(wrong := np.flatnonzero(counts != kept)):
        raise SlabError(
            f"{name}: corrupted plane, row {wrong[0]} keeps {counts[wrong[0]]} entries where {kept} values are stored"
        )
