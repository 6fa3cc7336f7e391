"""Decoder blocks for one new token, in one call of the compiled kernels (`slablm_blocks` of csrc/slablm.h).

    h = x + norm(W_o attention(q, k, v)),       q, k, v = W norm(x), q and k normed by head and turned by position
    y = h + norm(W_down (f(W_gate z) ⊙ W_up z)), z = norm(h)

The kernels read tensors where they are: a block is described by their addresses (`describe`), which hold as long as
nothing moves.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slablm.packing.symbols import PackedSymbols
from slablm.runtime.kernels import native
from slablm.runtime.kernels.dispatch import KERNEL_DTYPES

# Sizes of a block must be multiples of it: `kMostLanes` of csrc/slablm.h.
LANES = 16
MAX_SEQUENCES = native.MAX_TOKENS
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
FLOAT_TYPES = {dtype: native.SCALAR_TYPES[dtype] for dtype in KERNEL_DTYPES}

_NORM = struct.Struct("@Pq2d")
_BIAS = struct.Struct("@Pq")
_BLOCK = struct.Struct("@6qd")
# Sequences; inputs, outputs and their type; cosines, sines, type, dimensions, stride; the mask and its stride.
_STEP = struct.Struct("@q2Pq2P3qPq")
# Keys, values, type and strides; behind that the first token and the slot.
_CACHES = struct.Struct("@2P3q")
_RANGE = struct.Struct("@2q")


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a block.

    Attributes:
        hidden: width of the residual stream, a multiple of `LANES` as the next one and the last.
        intermediate: width of the MLP.
        heads: of queries.
        kv_heads: of keys and values, a divisor of `heads`.
        head_dim: numbers of a head.
        activation: a name of `ACTIVATIONS`.
        scaling: of products of queries and keys.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    scaling: float


@dataclass(frozen=True)
class Norm:
    """x (offset + weight) / √(mean x² + epsilon); x where there is no weight.

    Attributes:
        weight: [size of x] or None.
        offset: added to the weight.
        epsilon: added to the mean square.
    """

    weight: Tensor | None = None
    offset: float = 0.0
    epsilon: float = 0.0


@dataclass(frozen=True)
class Projection:
    """A weight and a bias.

    Attributes:
        weight: [m, n]; None if its rows are in another weight of the block.
        bias: [m] or None.
    """

    weight: PackedSymbols | None = None
    bias: Tensor | None = None


class Place(NamedTuple):
    """Where a block's keys and values are, and where the new ones go.

    Attributes:
        caches: from `describe_caches`.
        first: attention is from this token on.
        slot: of the new token.
    """

    caches: bytes
    first: int
    slot: int


def describe(shape: BlockShape, norms: Sequence[Norm], projections: Sequence[Projection]) -> bytes:
    """The block's `SlabBlock`.

    Args:
        shape: sizes.
        norms: before attention, behind it, before the MLP, behind it, of queries, of keys.
        projections: q, k, v, o, gate, up, down. Where one weight has all rows of q, k and v, the others are empty; so
            is up where gate has its rows.
    """
    assert (len(norms), len(projections)) == (6, 7)
    activation = ACTIVATIONS[shape.activation]
    sizes = (shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.head_dim, activation, shape.scaling)
    parts = [_BLOCK.pack(*sizes)]
    parts += [_NORM.pack(*_vector(norm.weight), norm.offset, norm.epsilon) for norm in norms]
    for projection in projections:
        weight = projection.weight
        parts.append(native.NO_SYMBOLS if weight is None else native.symbols_struct(weight))
        parts.append(_BIAS.pack(*_vector(projection.bias)))
    return b"".join(parts)


def describe_caches(keys: Tensor, values: Tensor) -> bytes:
    """The beginning of a block's `SlabPlace`.

    Args:
        keys: [sequences, kv_heads, capacity, head_dim], contiguous.
        values: likewise, of the same type.
    """
    return _CACHES.pack(keys.data_ptr(), values.data_ptr(), FLOAT_TYPES[keys.dtype], keys.stride(0), keys.stride(1))


def run(
    library: native.Library,
    instruction_set: str,
    blocks: bytes,
    inputs: Tensor,
    rotary: tuple[Tensor, Tensor],
    places: Sequence[Place],
    mask: Tensor | None,
) -> tuple[Tensor, ...] | None:
    """Run blocks, one behind the other; the new keys and values are written to their slots.

    Args:
        library: from `native.load`.
        instruction_set: one of `library.supported`.
        blocks: from `describe`, one behind the other.
        inputs: [sequences, 1, hidden], up to `MAX_SEQUENCES` of them, contiguous.
        rotary: cosines and sines, [sequences or 1, 1, dimensions that are turned], contiguous.
        places: of the blocks' keys and values.
        mask: [sequences or 1, 1, 1, slot + 1 − first] bool, contiguous, or None for all; for all blocks.

    Returns:
        As `inputs`, of every block. None where something is not finite, as for `native.symbols_matvec`.
    """
    outputs = inputs.new_empty((len(places), *inputs.shape))
    cosines, sines = rotary
    dimensions = cosines.shape[-1]
    step = _STEP.pack(
        inputs.shape[0],
        inputs.data_ptr(),
        outputs.data_ptr(),
        FLOAT_TYPES[inputs.dtype],
        cosines.data_ptr(),
        sines.data_ptr(),
        FLOAT_TYPES[cosines.dtype],
        dimensions,
        dimensions if cosines.shape[0] > 1 else 0,
        0 if mask is None else mask.data_ptr(),
        0 if mask is None or mask.shape[0] == 1 else mask.shape[-1],
    )
    ranges = [caches + _RANGE.pack(first, slot) for caches, first, slot in places]
    number, threads = native.INSTRUCTION_SETS[instruction_set], torch.get_num_threads()
    call = library.functions.slablm_blocks
    ran = native.ran(call(number, blocks, b"".join(ranges), len(places), step, threads))
    return outputs.unbind(0) if ran else None


def _vector(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), FLOAT_TYPES[tensor.dtype])
