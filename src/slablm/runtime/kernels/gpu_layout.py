"""GPU layout: a packed weight, laid out for the Triton kernels.

As on the CPU, the ternary states become two planes of bits. Words have 32 columns, and to each word belongs the number
of values that its row keeps before it, so that any program can start at any word: nobody scans a row.

    planes[i, w, 0]  bit b: entry (i, 32 w + b) is kept
    planes[i, w, 1]  bit b: it is −Σ u v; never set where kept
    offsets[i, w]    values of row i in front of word w, 16 bits without a sign
    values           rows one after the other in column order, then a few that kernels may read and ignore

This costs 2.5 bits per weight beside values and factors. All conversions are plain tensor operations and run on the
device that holds the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slablm.errors import SlabError
from slablm.packing import PackedWeight
from slablm.packing.planes import pack_bits, unpack_bits, unpack_states
from slablm.runtime.kernels.runtime_weight import (
    RuntimeWeight,
    check_value_bits,
    values_and_scales,
    wide_factors,
)

WORD_COLUMNS = 32
# A kernel reads the values of four columns at a time, also where the row has none left.
PADDING_VALUES = 4
LARGEST_KEPT = (1 << 16) - 1

# Weights whose states are unpacked at the same time, so that the peak while loading stays small.
_WEIGHTS_AT_ONCE = 1 << 24


@dataclass(frozen=True, eq=False)
class GpuWeight(RuntimeWeight):
    """A weight [m, n] in GPU layout; made by `to_gpu`, which checks what the kernels rely on.

    Attributes:
        in_features: n.
        values: m·k values and the padding, one-dimensional, float16, bfloat16 or int8.
        scales: [m] float32 for int8 values, else None.
        planes: [m, ⌈n / 32⌉, 1 or 2] int32: positions, and signs if there are any.
        offsets: [m, ⌈n / 32⌉] int16, to be read as unsigned.
        left: u, [m, r] float32.
        right: vᵀ, [r, 32 ⌈n / 32⌉] float32, filled up with 0.
    """

    in_features: int
    values: Tensor
    scales: Tensor | None
    planes: Tensor
    offsets: Tensor
    left: Tensor
    right: Tensor

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """What the operator takes: all fields but n, in order."""
        return self.values, self.scales, self.planes, self.offsets, self.left, self.right

    @property
    def padding(self) -> int:
        """Values behind the last one."""
        return PADDING_VALUES

    def masks(self, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        """As `RuntimeWeight.masks`."""
        # clone: a view as bytes needs stride 1, which `contiguous` does not give to a single word.
        planes = self.planes[begin:end].permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
        bits = [unpack_bits(plane.view(torch.uint8), self.in_features) for plane in planes]
        return bits[0], bits[1] if self.signs else None


def to_gpu(packed: PackedWeight, value_bits: int = 16, name: str = "weight") -> GpuWeight:
    """Lay a packed weight out for the Triton kernels, on the device it is on.

    Args:
        packed: on any device.
        value_bits: 16 keeps the stored values, 8 quantizes them.
        name: how errors call this weight.

    Raises:
        SlabError: a corrupted plane, an unknown `value_bits`, or more kept entries per row than offsets can count.
    """
    check_value_bits(value_bits)
    if packed.values.shape[1] > LARGEST_KEPT:
        raise SlabError(
            f"{name} keeps {packed.values.shape[1]} entries per row, the GPU kernels go up to {LARGEST_KEPT}: "
            "leave this layer packed"
        )
    packed.validate(name)
    planes, offsets = _planes(packed)
    values, scales = values_and_scales(packed, value_bits, PADDING_VALUES)
    left, right = wide_factors(packed, WORD_COLUMNS)
    return GpuWeight(packed.in_features, values, scales, planes, offsets, left, right)


def _planes(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Planes and offsets, unpacked a few rows at a time."""
    m, n = packed.values.shape[0], packed.in_features
    words, device = -(-n // WORD_COLUMNS), packed.plane.device
    planes = torch.empty(m, words, 2 if packed.signs else 1, dtype=torch.int32, device=device)
    offsets = torch.empty(m, words, dtype=torch.int16, device=device)
    step = max(1, _WEIGHTS_AT_ONCE // n)
    for begin in range(0, m, step):
        rows = slice(begin, begin + step)
        if packed.signs:
            factor = unpack_states(packed.plane[rows], n)
            kept = _whole_words(factor == 0)
            planes[rows, :, 1] = _words(_whole_words(factor < 0))
        else:
            kept = _whole_words(unpack_bits(packed.plane[rows], n))
        planes[rows, :, 0] = _words(kept)
        counts = kept.view(len(kept), -1, WORD_COLUMNS).sum(dim=2)
        offsets[rows] = (counts.cumsum(dim=1) - counts).to(torch.int16)  # wraps: the kernels read it unsigned
    return planes, offsets


def _whole_words(mask: Tensor) -> Tensor:
    """[m, n] bool, filled up with False to a multiple of 32 columns."""
    return functional.pad(mask, (0, -mask.shape[1] % WORD_COLUMNS))


def _words(mask: Tensor) -> Tensor:
    """[m, 32 w] bool → [m, w] int32, bit b of a word is its b-th column (little-endian bytes, as on every GPU)."""
    return pack_bits(mask).view(torch.int32)
