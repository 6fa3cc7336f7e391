"""Embedding and head in int8 rows: what the files must hold of those that `config.json` lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from slablm.checkpoint.files import WAY_OUT
from slablm.checkpoint.shards import DTYPES, Piece
from slablm.errors import SlabError


def check_int8_rows(
    names: Sequence[str], pieces: Mapping[str, Piece], tied: Sequence[Sequence[str]], where: Path
) -> dict[str, str]:
    """Compare int8 rows with the headers of the files.

    Args:
        names: of the modules, from the config.
        pieces: all tensors of the files by name.
        tied: groups of names with one tensor.
        where: the folder, for errors.

    Returns:
        Each name with the one under which the matrix is stored.

    Raises:
        SlabError: a part is missing, or of another shape or type; a file holds int8 rows that are not listed.
    """
    holders: dict[str, str] = {}
    for name in names:
        parts = {part: _stored(f"{name}.{part}", pieces, tied, where) for part in ("weight", "scales")}
        holder = parts["weight"].removesuffix(".weight")
        weight, scales = pieces[parts["weight"]], pieces[parts["scales"]]
        wanted = torch.int8, torch.float16, weight.shape[:1]
        if parts["scales"] != f"{holder}.scales" or len(weight.shape) != 2:
            raise SlabError(f"{where}: '{holder}.weight' and {parts['scales']!r} are no int8 rows: {WAY_OUT}")
        if (DTYPES[weight.dtype], DTYPES[scales.dtype], scales.shape) != wanted:
            raise SlabError(
                f"{where}: '{holder}.weight' is {weight.dtype} {list(weight.shape)} and '{holder}.scales' "
                f"{scales.dtype} {list(scales.shape)}, config.json says int8 rows: {WAY_OUT}"
            )
        holders[name] = holder
    for tensor, piece in pieces.items():
        name = tensor.removesuffix(".weight")
        if name != tensor and DTYPES[piece.dtype] == torch.int8 and name not in holders.values():
            raise SlabError(f"{where}: config.json does not list the int8 rows {tensor!r}: {WAY_OUT}")
    return holders


def _stored(tensor: str, pieces: Mapping[str, Piece], tied: Sequence[Sequence[str]], where: Path) -> str:
    """The name under which a tensor is stored: its own, or that of one it is tied to."""
    names = [tensor, *(other for group in tied if tensor in group for other in group)]
    found = next((name for name in names if name in pieces), None)
    if found is None:
        raise SlabError(f"{where}: tensor {tensor!r} is missing: {WAY_OUT}")
    return found


def check_scales(holders: Mapping[str, str], pieces: Mapping[str, Piece], where: Path) -> None:
    """Refuse scales that are negative or no numbers.

    Args:
        holders: from `check_int8_rows`.
        pieces: all tensors of the files by name.
        where: the folder, for errors.

    Raises:
        SlabError: naming the tensor.
    """
    for holder in sorted(set(holders.values())):
        scales = pieces[f"{holder}.scales"].read()
        if not (torch.isfinite(scales) & (scales >= 0)).all():
            raise SlabError(f"{where}: '{holder}.scales' has a scale that is negative, NaN or Inf: {WAY_OUT}")
