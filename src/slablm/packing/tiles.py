"""Symbols of 2 to 6 bits in tiles: what a file holds is what a kernel reads.

A matrix of symbols [m, n] is cut into tiles of 4 rows and w = 128 columns; where ⌈n / 64⌉ is odd, the last tile of
every four rows has w = 64. Columns are filled up to N = 64 ⌈n / 64⌉ and rows to a multiple of 4, with symbols 0. Tiles
follow each other along the rows, and each is contiguous.

A symbol of p bits is split into fields, each of which has a *plane* of its own in the tile, one behind the other:

    p = 2: a plane of 2 bits        p = 3: the low 2 bits, then the top bit
    p = 4: a plane of 4 bits        p = 5, 6: the low 4 bits, then the top one or two

In a plane of q bits a row of the tile takes b = w q / 8 bytes, rows one after the other. Field f (from the lowest bits
on) of byte k belongs to column f b + k: so one shift and one mask turn a vector of bytes into symbols of as many
columns that follow each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from slablm.methods.symbols import TILE_ROWS

TILE_COLUMNS, HALF_TILE = 128, 64
# Bits of the planes, by the bits of a symbol.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}


def padded_columns(n: int) -> int:
    """N, the columns that tiles of a row have together."""
    return -(-n // HALF_TILE) * HALF_TILE


def tiled_shape(m: int, n: int, bits: int) -> tuple[int, int]:
    """Shape of `pack_tiles`' result: rows of tiles, and bytes of each."""
    return -(-m // TILE_ROWS), TILE_ROWS * padded_columns(n) * bits // 8


def pack_tiles(symbols: Tensor, bits: int) -> Tensor:
    """Symbols in tiles.

    Args:
        symbols: [m, n] uint8, below 2^bits.
        bits: p, 2 to 6.

    Returns:
        uint8, of shape `tiled_shape`.
    """
    m, n = symbols.shape
    padded = functional.pad(symbols, (0, padded_columns(n) - n, 0, -m % TILE_ROWS))
    rows = padded.view(-1, TILE_ROWS, padded.shape[1])
    return torch.cat([_packed_tile(rows[:, :, columns], bits) for columns in _tiles(n)], dim=1)


def unpack_tiles(packed: Tensor, bits: int, m: int, n: int) -> Tensor:
    """Inverse of `pack_tiles`.

    Args:
        packed: uint8, of shape `tiled_shape`.
        bits: p.
        m: rows.
        n: columns.

    Returns:
        [m, n] uint8.
    """
    sizes = [TILE_ROWS * (columns.stop - columns.start) * bits // 8 for columns in _tiles(n)]
    tiles = [_unpacked_tile(tile, bits) for tile in torch.split(packed, sizes, dim=1)]
    return torch.cat(tiles, dim=2).flatten(0, 1)[:m, :n].contiguous()


def _tiles(n: int) -> list[slice]:
    """The columns of each tile."""
    stop = padded_columns(n)
    return [slice(start, min(start + TILE_COLUMNS, stop)) for start in range(0, stop, TILE_COLUMNS)]


def _packed_tile(symbols: Tensor, bits: int) -> Tensor:
    """[rows of tiles, 4, w] → [rows of tiles, bytes]."""
    planes, low = [], 0
    for width in PLANES[bits]:
        fields = (symbols >> low) & (2**width - 1)
        parts = fields.view(*fields.shape[:2], 8 // width, -1).unbind(dim=2)
        plane = torch.zeros_like(parts[0])
        for place, part in enumerate(parts):
            plane |= part << (place * width)
        planes.append(plane.flatten(1))
        low += width
    return torch.cat(planes, dim=1)


def _unpacked_tile(tile: Tensor, bits: int) -> Tensor:
    """Inverse of `_packed_tile`."""
    planes = torch.split(tile, [tile.shape[1] * width // bits for width in PLANES[bits]], dim=1)
    symbols, low = None, 0
    for width, plane in zip(PLANES[bits], planes, strict=True):
        rows = plane.reshape(len(tile), TILE_ROWS, -1)
        mask = 2**width - 1
        fields = torch.cat([(rows >> place) & mask for place in range(0, 8, width)], dim=2) << low
        symbols = fields if symbols is None else symbols | fields
        low += width
    assert symbols is not None
    return symbols
