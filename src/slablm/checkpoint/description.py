"""What `config.json` says about the compressed layers, checked: types, ranges, and the headers of the files.

It decides how bytes are decoded: with another `group_size` the same codes are another weight. So nothing here is
believed before its type and range are known and every part of every layer has the shape and type in the files that the
description gives it. What no shape can tell (`group_size` 32 or 63 for 64 columns) is covered by a digest in the files'
headers since format version 4 (`Description.digest`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from slablm.checkpoint.config_file import json_digest
from slablm.checkpoint.files import WAY_OUT
from slablm.checkpoint.guard import FIRST_WITH_FP16_GRID, check_version
from slablm.checkpoint.shards import DTYPES, Piece
from slablm.config import VALUE_DTYPES
from slablm.errors import SlabError
from slablm.methods.drift import Drift
from slablm.methods.grid import LARGEST_BITS
from slablm.packing import GRID_DTYPE, PackedSpec

_PLANES = (".states", ".positions")  # one of them is there in every compressed layer, and in no other
_DECODING = ("kept", "rank", "signs", "value_bits", "group_size", "grid_dtype")
# What magnitudes on a grid were rounded to before they became FP16 numbers in every model.
_OLD_GRID = "bfloat16"
# Of errors, in config.json.
_DECIMALS = 6


@dataclass(frozen=True)
class ModuleSpec:
    """What `config.json` says about one compressed layer.

    Attributes:
        kept: entries k kept per row.
        rank: rank of the factors.
        signs: ternary states (True) or a bitmap of positions (False).
        output_error: relative output error measured while compressing.
        unseen_error: the same on text that calibrated nothing; None if it was not measured.
        value_bits: bits of a code if the values lie on a grid, else None.
        group_size: columns that share a scale of the grid, else None.
        grid_dtype: type of magnitudes on the grid, where that is not FP16.
    """

    kept: int
    rank: int
    signs: bool
    output_error: float
    unseen_error: float | None = None
    value_bits: int | None = None
    group_size: int | None = None
    grid_dtype: str | None = None

    @classmethod
    def from_json(cls, name: str, entry: Any) -> ModuleSpec:
        """Read an entry of ``modules``.

        Args:
            name: of the layer, for errors.
            entry: anything.

        Raises:
            SlabError: an entry is missing, unknown, of another type or out of range.
        """
        if not isinstance(entry, dict):
            raise _damaged(f"modules is damaged: {name!r} is no object")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(map(str, entry.keys() - known)):
            raise _damaged(f"modules is damaged: {name!r} has an unknown entry {unknown[0]!r}")
        for key in ("kept", "rank", "signs", "output_error"):
            if key not in entry:
                raise _damaged(f"modules is damaged: {name!r} has no {key!r}")
        spec = cls(**entry)
        for key, right in spec._checks().items():
            if not right:
                raise _damaged(f"modules is damaged: {key!r} of {name!r} is {getattr(spec, key)!r}")
        return spec

    def _checks(self) -> dict[str, bool]:
        """Whether each entry has the right type and range; what needs the layer's shape is left to `check_parts`."""
        coded = self.value_bits is not None
        return {
            "kept": _is_int(self.kept) and self.kept >= 0,
            "signs": self.signs is True or (self.signs is False and not coded),
            "rank": _is_int(self.rank) and (self.rank == 1 if coded else self.rank >= 0),
            "output_error": _is_finite(self.output_error),
            "unseen_error": self.unseen_error is None or _is_finite(self.unseen_error),
            "value_bits": not coded or (_is_int(self.value_bits) and 1 <= (self.value_bits or 0) <= LARGEST_BITS),
            "group_size": (_is_int(self.group_size) and (self.group_size or 0) >= 1)
            if coded
            else self.group_size is None,
            "grid_dtype": self.grid_dtype is None or (coded and self.grid_dtype == _OLD_GRID),
        }

    def packed(self, out_features: int, in_features: int, value_dtype: torch.dtype) -> PackedSpec:
        """What is stored of this layer."""
        grid_dtype = GRID_DTYPE if self.grid_dtype is None else getattr(torch, self.grid_dtype)
        return PackedSpec(
            out_features,
            in_features,
            self.kept,
            self.rank,
            self.signs,
            value_dtype,
            self.value_bits,
            self.group_size,
            grid_dtype,
        )

    @classmethod
    def of(cls, spec: PackedSpec, output_error: float, unseen_error: float | None) -> ModuleSpec:
        """What is said about a packed weight; errors are rounded to six decimals."""
        old_grid = spec.value_bits is not None and spec.grid_dtype != GRID_DTYPE
        return cls(
            spec.kept,
            spec.rank,
            spec.signs,
            round(output_error, _DECIMALS),
            None if unseen_error is None else round(unseen_error, _DECIMALS),
            spec.value_bits,
            spec.group_size,
            _OLD_GRID if old_grid else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; what a layer does not have is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Description:
    """All that decides how the compressed layers of a checkpoint are decoded.

    Attributes:
        modules: full name → what is stored of it.
        value_dtype: ``float16`` or ``bfloat16``.
        format_version: as `config.json` says.
    """

    modules: Mapping[str, ModuleSpec]
    value_dtype: str
    format_version: int

    @classmethod
    def from_json(cls, modules: Any, value_dtype: Any, format_version: Any) -> Description:
        """Read the entries of ``quantization_config``; modules that are `ModuleSpec` already are taken as they are.

        Raises:
            SlabError: see `check_version` and `ModuleSpec.from_json`; the value type is none.
        """
        check_version(format_version)
        if not isinstance(modules, dict) or not modules or value_dtype not in VALUE_DTYPES:
            raise _damaged("is damaged (modules or value_dtype missing or wrong)", "")
        for name in modules:
            if not isinstance(name, str) or not name:
                raise _damaged(f"modules is damaged: {name!r} is no name of a layer")
        specs = {
            name: entry if isinstance(entry, ModuleSpec) else ModuleSpec.from_json(name, entry)
            for name, entry in modules.items()
        }
        if format_version < FIRST_WITH_FP16_GRID and value_dtype == _OLD_GRID:
            # An old file means the numbers that were measured when it was written.
            specs = {n: s if s.value_bits is None else replace(s, grid_dtype=_OLD_GRID) for n, s in specs.items()}
        return cls(specs, value_dtype, format_version)

    @property
    def dtype(self) -> torch.dtype:
        """Type of values and factors."""
        dtype = getattr(torch, self.value_dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def digest(self) -> str:
        """Digest of what decides decoding; see FORMAT.md. Errors and settings are not part of it."""
        modules = {
            name: {key: value for key, value in spec.to_dict().items() if key in _DECODING}
            for name, spec in self.modules.items()
        }
        return json_digest({"modules": modules, "value_dtype": self.value_dtype})


def read_drift(entries: Any) -> tuple[Drift, ...]:
    """The drift behind each block; what is a `Drift` already is taken as it is.

    Args:
        entries: a list; None where it was not measured.

    Raises:
        SlabError: it is something else.
    """
    if entries is None:
        return ()
    if not isinstance(entries, list | tuple):
        raise _damaged("drift is damaged: it is no list")
    return tuple(_read_block(index, entry) for index, entry in enumerate(entries))


def drift_entry(drift: Drift) -> dict[str, float]:
    """What is said about the drift behind a block, rounded to six decimals."""
    return {name: round(value, _DECIMALS) for name, value in asdict(drift).items()}


def _read_block(index: int, entry: Any) -> Drift:
    if isinstance(entry, Drift):
        return entry
    wanted = {field.name for field in fields(Drift)}
    if not isinstance(entry, dict) or entry.keys() != wanted or not all(map(_is_size, entry.values())):
        raise _damaged(f"drift is damaged: block {index} has {entry!r}")
    return Drift(**entry)


def check_parts(description: Description, pieces: Mapping[str, Piece], where: Path) -> dict[str, PackedSpec]:
    """Compare every part of every compressed layer with the headers of the files.

    Args:
        description: what the config says.
        pieces: all tensors of the files by name.
        where: the folder, for errors.

    Returns:
        What is stored of each layer.

    Raises:
        SlabError: a part is missing, or of another shape or type; a file holds a compressed layer that is not listed.
    """
    specs = {
        name: _check_layer(name, module, description.dtype, pieces, where)
        for name, module in description.modules.items()
    }
    for tensor in pieces:
        layer, dot, part = tensor.rpartition(".")
        if dot + part in _PLANES and layer not in specs:
            raise SlabError(f"{where}: config.json does not list the compressed layer {layer!r}: {WAY_OUT}")
    return specs


def _check_layer(
    name: str, module: ModuleSpec, dtype: torch.dtype, pieces: Mapping[str, Piece], where: Path
) -> PackedSpec:
    left, right = (_piece(pieces, f"{name}.{part}", where).shape for part in ("left", "right"))
    if len(left) != 2 or len(right) != 2:
        raise SlabError(f"{where}: a factor of {name!r} is no matrix: {WAY_OUT}")
    spec = module.packed(left[0], right[1], dtype)
    if spec.kept > spec.in_features:
        raise SlabError(
            f"{where}: config.json says that {name!r} keeps {spec.kept} of the {spec.in_features} entries of a row: "
            f"{WAY_OUT}"
        )
    for part, (shape, part_dtype) in spec.parts().items():
        piece = _piece(pieces, f"{name}.{part}", where)
        if piece.shape != shape or DTYPES[piece.dtype] != part_dtype:
            raise SlabError(
                f"{where}: tensor '{name}.{part}' is {piece.dtype} {list(piece.shape)}, config.json says "
                f"{str(part_dtype).removeprefix('torch.')} {list(shape)}: {WAY_OUT}"
            )
    return spec


def _piece(pieces: Mapping[str, Piece], name: str, where: Path) -> Piece:
    if name not in pieces:
        raise SlabError(f"{where}: tensor {name!r} is missing: {WAY_OUT}")
    return pieces[name]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return _is_finite(value) and value >= 0


def _damaged(what: str, dot: str = ".") -> SlabError:
    return SlabError(f"config.json: quantization_config{dot or ' '}{what}: {WAY_OUT}")
