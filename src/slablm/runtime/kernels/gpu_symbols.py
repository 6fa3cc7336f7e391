"""Weights in symbols on NVIDIA GPUs: kernels in CUDA C++, compiled for the device when they are first needed.

By the number of tokens alone, so that a CUDA graph or `torch.compile` sees a fixed sequence of launches; nothing is
read back from the device.

- up to `FEW_TOKENS`: the inputs are rotated and made integers, `quantize`, and multiplied straight from the tiles,
  `matvec`, up to 16 tokens at a time;
- more: the inputs are rotated, `rotate`, and rows of the matrix for rotated inputs unpacked into a scratch tile,
  `unpack`, which the vendor's library multiplies.

The text of the kernels says how they work: ``symbols_decode.cuh``, ``symbols_device.cuh`` and those behind them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from slablm.methods.rotation import Rotation
from slablm.methods.symbols import TILE_ROWS
from slablm.packing.planes import pack_bits
from slablm.packing.symbols import PackedSymbols
from slablm.packing.tiles import TILE_COLUMNS
from slablm.runtime.kernels.gpu_text import TYPES, text_of
from slablm.system import cuda

FEW_TOKENS = 32
# Tokens of one product, rounded up to one of these; the last is what fits into registers.
_TOKENS = (1, 2, 4, 8, 16)
_TEXTS = ("numbers.cuh", *(f"symbols_{part}.cuh" for part in ("decode", "device", "inputs", "product", "unpack")))
_THREADS = 256
# Rows of a block of threads in `matvec`.
_ROWS = 32
# Columns of a piece that one block of threads rotates, at least, and at most, so that they fit into shared memory.
_PIECE, _LARGEST_PIECE = 1024, 16384
# Bytes of one unpacked tile, at most. With 32 MiB the products of wide weights had too few rows to fill an H100.
_TILE_BYTES = 256 << 20
# As bytes of memory are read 16 at a time.
_ALIGNMENT = 16


def reads(weight: PackedSymbols) -> bool:
    """Whether the kernels have code for a weight."""
    rotation = weight.spec.rotation
    piece = _PIECE if rotation is None else _piece(rotation)
    aligned = all(part.data_ptr() % _ALIGNMENT == 0 for part in (weight.symbols, weight.levels))
    # The last is asked of a device, so only where all else is well.
    return aligned and piece <= _LARGEST_PIECE and _shared(piece) <= _shared_room(weight.device)


def linear(inputs: Tensor, weight: PackedSymbols) -> Tensor:
    """Ŵ applied to [t, n] → [t, m], in the inputs' dtype.

    Up to `FEW_TOKENS` tokens, inputs are rounded to 16 bits per 128 columns, and products are summed in integers
    (relative error 1e-4); above it inputs and weight are rounded to the inputs' dtype. A token that is not finite comes
    out as NaN.

    Args:
        inputs: float32, float16 or bfloat16, contiguous, on the weight's device.
        weight: one that `reads` accepts.
    """
    tokens = inputs.shape[0]
    if tokens == 0:
        return inputs.new_empty(0, weight.spec.out_features)
    if tokens > FEW_TOKENS:
        return _many(inputs, weight)
    parts = torch.split(inputs, _TOKENS[-1])
    outputs = inputs.new_empty(tokens, weight.spec.out_features)
    for part, output in zip(parts, torch.split(outputs, _TOKENS[-1]), strict=True):
        _few(part, weight, output)
    return outputs


def times(inputs: Tensor, weight: PackedSymbols) -> Tensor:
    """[t, m] → [t, n]: multiplied by Ŵ, for gradients; float32, and not in place."""
    result = inputs.new_zeros(inputs.shape[0], weight.in_features, dtype=torch.float32)
    for rows, tile in _tiles(weight, inputs.dtype):
        result += inputs[:, rows] @ tile
    rotation = weight.spec.rotation
    return result if rotation is None else rotation.restore(result)


def rotate(inputs: Tensor, rotation: Rotation) -> Tensor:
    """Rᵀ of every row of [t, n], in the inputs' dtype, computed in float32."""
    outputs = torch.empty_like(inputs)
    size = _piece(rotation)
    grid = (inputs.shape[0], -(-rotation.size // size))
    arguments = (inputs, _minus(rotation, inputs.device), outputs, *_integers(rotation.size, size, rotation.block))
    _kernel("rotate", inputs).launch(grid, _THREADS, arguments, _shared(size))
    return outputs


def unpack(weight: PackedSymbols, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows begin … end of the matrix for rotated inputs, [end − begin, n] in `dtype`."""
    outputs = torch.empty(end - begin, weight.in_features, dtype=dtype, device=weight.device)
    words = 16 * _tiles_of(weight.in_features)
    grid, numbers = (end - begin, -(-words // _THREADS)), _integers(weight.in_features, begin)
    _kernel("unpack", outputs, weight).launch(grid, _THREADS, (*weight.parts().values(), outputs, *numbers))
    return outputs


def _few(inputs: Tensor, weight: PackedSymbols, outputs: Tensor) -> None:
    """At most 16 tokens, into `outputs`."""
    m, n = weight.spec.out_features, weight.in_features
    tokens, shape = inputs.shape[0], _shape(weight, inputs.shape[0])
    operand = torch.empty(_tiles_of(n) * shape.records, dtype=torch.int8, device=inputs.device)
    rotation = weight.spec.rotation
    size, block = (_PIECE, 0) if rotation is None else (_piece(rotation), rotation.block)
    minus = ctypes.c_void_p() if rotation is None else _minus(rotation, inputs.device)
    prepare, product = (_kernel(name, inputs, weight, shape) for name in ("quantize", "matvec"))
    grid, arguments = (-(-n // size), tokens), (inputs, minus, operand, *_integers(n, size, block))
    prepare.launch(grid, min(512, size // 8), arguments, _shared(size), after=True)
    parts, blocks, shared = weight.parts().values(), -(-m // _ROWS), shape.shared(weight.spec.bits)
    sizes = _integers(m, n, tokens)
    product.launch((blocks,), 32 * shape.k_warps, (*parts, operand, outputs, *sizes), shared, after=True)


def _many(inputs: Tensor, weight: PackedSymbols) -> Tensor:
    rotation = weight.spec.rotation
    rotated = inputs if rotation is None else rotate(inputs, rotation)
    tiles = [functional.linear(rotated, tile) for _, tile in _tiles(weight, inputs.dtype)]
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)


def _tiles(weight: PackedSymbols, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the matrix for rotated inputs, and which they are."""
    m = weight.spec.out_features
    step = max(1, _TILE_BYTES // (weight.in_features * dtype.itemsize))
    for begin in range(0, m, step):
        end = min(begin + step, m)
        yield slice(begin, end), unpack(weight, begin, end, dtype)


def _piece(rotation: Rotation) -> int:
    """Columns that a block of threads rotates."""
    return max(_PIECE, rotation.block)


def _shared(size: int) -> int:
    """Bytes of shared memory for so many columns; a gap after every 8."""
    return 4 * (size + size // 8)


def _integers(*numbers: int) -> tuple[ctypes.c_int, ...]:
    return tuple(map(ctypes.c_int, numbers))


@dataclass(frozen=True)
class Shape:
    """What `matvec` is compiled for.

    Attributes:
        tokens: at most.
        k_warps: warps of a block, which share the columns.
        depth: stages of the ring of tiles.
        blocks: on a multiprocessor at a time, by registers.
    """

    tokens: int = 1
    k_warps: int = 4
    depth: int = 4
    blocks: int = 4

    @property
    def records(self) -> int:
        """Bytes of the operand for a tile of columns: of four tokens each two bytes for each column, and units."""
        return -(-self.tokens // 4) * (128 * min(8, 2 * self.tokens) + 32)

    def shared(self, bits: int) -> int:
        """Bytes of shared memory: the ring, and in the end the sums in its place."""
        stage = 64 * (bits | 1) * _ROWS // TILE_ROWS + self.records
        return self.k_warps * max(self.depth * stage, 4 * _ROWS * self.tokens)


# By tokens: k_warps, depth, blocks, for weights with many rows and with fewer, the first choice first. What does not
# fit into the shared memory of a device is passed over.
_MANY_ROWS = 8192
_SHAPES = {
    1: (((4, 4, 4), (4, 2, 4)), ((16, 4, 1), (16, 3, 1), (16, 2, 1), (8, 3, 1))),
    4: (((4, 3, 2), (4, 2, 2)), ((8, 3, 1), (4, 2, 2))),
    8: (((4, 3, 2), (4, 2, 2)), ((8, 3, 1), (8, 2, 1), (4, 2, 2))),
    16: (((4, 3, 2), (4, 2, 2), (2, 2, 2)), ((8, 2, 1), (4, 3, 2), (2, 2, 2))),
}


def _shape(weight: PackedSymbols, count: int) -> Shape:
    """The first shape for so many tokens that fits."""
    room = _shared_room(weight.device)
    tried = shapes(weight.spec.out_features, count)
    return next(shape for shape in tried if shape.shared(weight.spec.bits) <= room)


def shapes(rows: int, count: int) -> Iterator[Shape]:
    """Those for a weight with so many rows and for so many tokens, the first choice first."""
    tokens = next(tokens for tokens in _TOKENS if tokens >= count)
    tabled = next(most for most in _SHAPES if most >= tokens)
    for numbers in _SHAPES[tabled][0 if rows > _MANY_ROWS else 1]:
        yield Shape(tokens, *numbers)


@cache
def _shared_room(device: torch.device) -> int:
    """Bytes of shared memory that a block of threads can have."""
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _tiles_of(n: int) -> int:
    return -(-n // TILE_COLUMNS)


def _kernel(name: str, inputs: Tensor, weight: PackedSymbols | None = None, shape: Shape = Shape()) -> cuda.Kernel:
    bits = 4 if weight is None else weight.spec.bits
    return cuda.kernel(source(bits, inputs.dtype, shape), name, inputs.device)


@cache
def source(bits: int, dtype: torch.dtype, shape: Shape) -> str:
    """The text that is compiled for symbols of `bits` bits, and so on."""
    constants = {"BITS": bits, "TYPE": TYPES[dtype], **{name.upper(): value for name, value in vars(shape).items()}}
    return text_of(constants, _TEXTS)


@cache
def _minus(rotation: Rotation, device: torch.device) -> Tensor:
    """Bits of the columns whose sign is minus, 32 in a word."""
    signs = functional.pad(rotation.signs < 0, (0, -rotation.size % 32))
    return pack_bits(signs[None]).view(torch.int32)[0].to(device)
