"""Weights in symbols on NVIDIA GPUs: kernels in CUDA C++, compiled for the device when they are first needed.

By the number of tokens alone, so that a CUDA graph or `torch.compile` sees a fixed sequence of launches; nothing is
read back from the device.

- up to `FEW_TOKENS`: the inputs are rotated and made integers, `quantize`, and multiplied straight from the tiles,
  `matvec`, up to 16 tokens at a time;
- more: the inputs are rotated, `rotate`, and rows of the matrix for rotated inputs unpacked into a scratch tile,
  `unpack`, which the vendor's library multiplies.

The text of the kernels says how they work: ``symbols.cu`` and ``symbols_decode.cuh``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from slablm.methods.rotation import Rotation
from slablm.packing.planes import pack_bits
from slablm.packing.symbols import PackedSymbols
from slablm.packing.tiles import TILE_COLUMNS, padded_columns
from slablm.system import cuda

FEW_TOKENS = 64
# Tokens of one product, rounded up to one of these; the last is what fits into registers.
_TOKENS = (1, 2, 4, 8, 16)
# Of levels on no grid: 14 bits.
_FINE_STEPS = 16383
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_TEXTS = ("symbols_decode.cuh", "symbols.cu")
_THREADS = 256
# Columns of a piece that one block of threads rotates, at least, and at most, so that they fit into shared memory.
_PIECE, _LARGEST_PIECE = 1024, 16384
_LEVELS_BYTES = 64
# Bytes of one unpacked tile: enough rows for an efficient product, and it still fits into the L2 cache of large GPUs.
_TILE_BYTES = 32 << 20
# As bytes of memory are read 16 at a time.
_ALIGNMENT = 16


def reads(weight: PackedSymbols) -> bool:
    """Whether the kernels have code for a weight."""
    spec = weight.spec
    block = 1 if spec.rotation is None else spec.rotation.block
    aligned = weight.symbols.data_ptr() % _ALIGNMENT == 0
    return spec.group_size % TILE_COLUMNS == 0 and block <= _LARGEST_PIECE and aligned


def linear(inputs: Tensor, weight: PackedSymbols, steps: int | None) -> Tensor:
    """Ŵ applied to [t, n] → [t, m], in the inputs' dtype.

    Up to `FEW_TOKENS` tokens inputs are rounded to 16 bits per 128 columns and levels on no grid to 14, and products are
    summed in integers (relative error about 1e-4); above it both are rounded to the inputs' dtype. A token that is not finite
    comes out as NaN where its inputs are rotated or few.

    Args:
        inputs: float32, float16 or bfloat16, contiguous, on the weight's device.
        weight: one that `reads` accepts.
        steps: of the grid its levels lie on, if they do.
    """
    tokens = inputs.shape[0]
    if tokens == 0:
        return inputs.new_empty(0, weight.spec.out_features)
    if tokens > FEW_TOKENS:
        return _many(inputs, weight)
    parts = torch.split(inputs, _TOKENS[-1])
    outputs = inputs.new_empty(tokens, weight.spec.out_features)
    for part, output in zip(parts, torch.split(outputs, _TOKENS[-1]), strict=True):
        _few(part, weight, steps, output)
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
    grid = (-(-rotation.size // size), inputs.shape[0])
    arguments = (inputs, _minus(rotation, inputs.device), outputs, *_integers(rotation.size, size, rotation.block))
    _kernel("rotate", inputs).launch(grid, _THREADS, arguments, _shared(size))
    return outputs


def unpack(weight: PackedSymbols, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows begin … end of the matrix for rotated inputs, [end − begin, n] in `dtype`."""
    outputs = torch.empty(end - begin, weight.in_features, dtype=dtype, device=weight.device)
    words = (end - begin) * 16 * -(-padded_columns(weight.in_features) // TILE_COLUMNS)
    parts = (weight.symbols, weight.scales, weight.levels, weight.left, weight.right)
    arguments = (*parts, outputs, *_integers(weight.in_features, begin, end - begin))
    _kernel("unpack", outputs, weight).launch((-(-words // _THREADS),), _THREADS, arguments)
    return outputs


def _few(inputs: Tensor, weight: PackedSymbols, steps: int | None, outputs: Tensor) -> None:
    """At most 16 tokens, into `outputs`."""
    m, n = weight.spec.out_features, weight.in_features
    tokens = next(tokens for tokens in _TOKENS if tokens >= inputs.shape[0])
    columns, tiles = padded_columns(n), -(-n // TILE_COLUMNS)
    shape = _shape(m, n, tokens, steps is None)
    record = 256 * (8 if tokens >= 4 else 2 * tokens) + 32
    operand = torch.empty(-(-tokens // 4) * tiles * record, dtype=torch.int8, device=inputs.device)
    levels = torch.empty(_LEVELS_BYTES, dtype=torch.int8, device=inputs.device)
    rotation = weight.spec.rotation
    size, block = (_PIECE, 0) if rotation is None else (_piece(rotation), rotation.block)
    minus = ctypes.c_void_p() if rotation is None else _minus(rotation, inputs.device)
    parts = (inputs, minus, weight.right, weight.levels, operand, levels)
    prepare, product = (_kernel(name, inputs, weight, shape) for name in ("quantize", "matvec"))
    grid = (-(-n // size) + 1, inputs.shape[0])
    prepare.launch(grid, min(512, size // 8), (*parts, *_integers(n, size, block, steps or _FINE_STEPS)), _shared(size) + 2 * size)
    parts = (weight.symbols, weight.scales, weight.left, operand, levels, outputs)
    span = -(-columns // 128 // shape.k_warps) + 2
    stage = 1024 * shape.fragments * (1 + weight.spec.bits % 2)
    ring = shape.k_warps * shape.depth * (-(-tokens // 4) * record + shape.row_warps * stage)
    scales = 32 * shape.fragments * shape.row_warps * shape.k_warps * span
    sums = 64 * shape.fragments * shape.row_warps * shape.k_warps * tokens
    rows = 16 * shape.fragments * shape.row_warps
    threads = 32 * shape.k_warps * shape.row_warps
    numbers = _integers(m, n, inputs.shape[0], span)
    product.launch((-(-m // rows),), threads, (*parts, *numbers), max(ring + scales, sums), after=True)


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
        k_warps: warps that share the columns.
        row_warps: warps that share the operand, for other rows.
        fragments: of 16 rows per warp.
        depth: tiles that are loaded at a time.
        blocks: on a multiprocessor at a time, by registers.
        fine: whether levels lie on no grid.
    """

    tokens: int = 1
    k_warps: int = 8
    row_warps: int = 1
    fragments: int = 1
    depth: int = 3
    blocks: int = 2
    fine: bool = False


def _shape(m: int, n: int, tokens: int, fine: bool) -> Shape:
    if tokens > 8:
        return Shape(tokens, 4, 1, 2, 2, 2, fine)
    if tokens > 2:
        k = 4 if m > 8192 else 8
        return Shape(tokens, k, 1, 2, 2, 8 // k, fine)
    k = 4 if m > 8192 else 8
    return Shape(tokens, k, 1, 1, 4, 16 // k, fine)


def _kernel(name: str, inputs: Tensor, weight: PackedSymbols | None = None, shape: Shape = Shape()) -> cuda.Kernel:
    bits, group_size = (4, TILE_COLUMNS) if weight is None else (weight.spec.bits, weight.spec.group_size)
    return cuda.kernel(source(bits, group_size, inputs.dtype, shape), name, inputs.device)


@cache
def source(bits: int, group_size: int, dtype: torch.dtype, shape: Shape) -> str:
    """The text that is compiled for symbols of `bits` bits, and so on."""
    constants = {
        "BITS": bits,
        "TILES_PER_GROUP": group_size // TILE_COLUMNS,
        "TYPE": _TYPES[dtype],
        **{name.upper(): int(value) for name, value in vars(shape).items()},
    }
    lines = [f"#define {name} {value}\n" for name, value in constants.items()]
    texts = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _TEXTS]
    return "".join((*lines, *texts))


@cache
def _minus(rotation: Rotation, device: torch.device) -> Tensor:
    """Bits of the columns whose sign is minus, 32 in a word."""
    signs = functional.pad(rotation.signs < 0, (0, -rotation.size % 32))
    return pack_bits(signs[None]).view(torch.int32)[0].to(device)
