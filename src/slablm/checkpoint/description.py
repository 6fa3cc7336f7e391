"""What `config.json` says about the compressed layers, checked: types, ranges, and the headers of the files.

It decides how bytes are decoded: with another `group_size` the same codes are another weight. So nothing here is
believed before its type and range are known and every part of every layer has the shape and type in the files that the
description gives it. What no shape can tell (`group_size` 32 or 63 for 64 columns) is covered by a digest in the files'
headers since format version 4 (`Description.digest`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from slablm.checkpoint.config_file import json_digest
from slablm.checkpoint.files import WAY_OUT
from slablm.checkpoint.guard import FIRST_WITH_FP16_GRID, FIRST_WITH_SYMBOLS, check_version
from slablm.checkpoint.shards import DTYPES, Piece
from slablm.config import VALUE_DTYPES
from slablm.errors import SlabError
from slablm.methods.drift import Drift
from slablm.methods.rotation import Rotation
from slablm.methods.symbols import FEWEST_BITS, MOST_BITS
from slablm.packing import GRID_DTYPE, CodedSpec, PackedSpec, Spec, SymbolSpec
from slablm.packing.coded import LARGEST_BITS

_PLANES = (".states", ".positions", ".symbols")  # one of them is there in every compressed layer, and in no other
_ERRORS = ("output_error", "unseen_error")
# What magnitudes on a grid were rounded to before they became FP16 numbers in every model.
_OLD_GRID = "bfloat16"
# Of errors, in config.json.
_DECIMALS = 6


@dataclass(frozen=True, kw_only=True)
class ModuleSpec:
    """What `config.json` says about one compressed layer, whatever its form.

    Attributes:
        output_error: relative output error measured while compressing.
        unseen_error: the same on text that calibrated nothing; None if it was not measured.
    """

    output_error: float
    unseen_error: float | None = None

    @staticmethod
    def from_json(name: str, entry: Any) -> ModuleSpec:
        """Read an entry of ``modules``.

        Args:
            name: of the layer, for errors.
            entry: anything.

        Raises:
            SlabError: an entry is missing, unknown, of another type or out of range.
        """
        if not isinstance(entry, dict):
            raise _damaged(f"modules is damaged: {name!r} is no object")
        form = SymbolModule if "symbol_bits" in entry else RowModule
        known = {field.name: field.default is MISSING for field in fields(form)}
        if unknown := sorted(map(str, entry.keys() - known)):
            raise _damaged(f"modules is damaged: {name!r} has an unknown entry {unknown[0]!r}")
        for key, needed in known.items():
            if needed and key not in entry:
                raise _damaged(f"modules is damaged: {name!r} has no {key!r}")
        spec = form(**entry)
        errors = {
            "output_error": _is_finite(spec.output_error),
            "unseen_error": spec.unseen_error is None or _is_finite(spec.unseen_error),
        }
        for key, right in (spec._checks() | errors).items():
            if not right:
                raise _damaged(f"modules is damaged: {key!r} of {name!r} is {getattr(spec, key)!r}")
        return spec

    def _checks(self) -> dict[str, bool]:
        """Whether each entry has the right type and range; what needs the layer's shape is left to `check_parts`."""
        raise NotImplementedError

    def packed(self, out_features: int, in_features: int, value_dtype: torch.dtype) -> Spec:
        """What is stored of this layer.

        Args:
            out_features: m.
            in_features: n.
            value_dtype: the checkpoint's.

        Raises:
            ValueError: an entry does not fit the shape.
        """
        raise NotImplementedError

    @staticmethod
    def of(
        spec: PackedSpec | SymbolSpec, value_dtype: torch.dtype, output_error: float, unseen_error: float | None
    ) -> ModuleSpec:
        """What is said about a packed weight; errors are rounded to six decimals.

        Args:
            spec: what is stored.
            value_dtype: the checkpoint's.
            output_error: as measured.
            unseen_error: as measured.
        """
        output_error = round(output_error, _DECIMALS)
        unseen_error = None if unseen_error is None else round(unseen_error, _DECIMALS)
        if isinstance(spec, SymbolSpec):
            return SymbolModule(
                output_error=output_error,
                unseen_error=unseen_error,
                symbol_bits=spec.bits,
                rotation=None if spec.rotation is None else spec.rotation.block,
                seed=None if spec.rotation is None else spec.rotation.seed,
            )
        return RowModule(
            output_error=output_error,
            unseen_error=unseen_error,
            kept=spec.kept,
            rank=spec.rank,
            signs=spec.signs,
            value_dtype=None if spec.value_dtype == value_dtype else str(spec.value_dtype).removeprefix("torch."),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; what a layer does not have is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class SymbolModule(ModuleSpec):
    """A layer with one symbol per weight.

    Attributes:
        symbol_bits: bits of a symbol.
        rotation: block of the rotation of the inputs; None if there is none.
        seed: of its signs.
    """

    symbol_bits: int
    rotation: int | None = None
    seed: int | None = None

    def _checks(self) -> dict[str, bool]:
        return {
            "symbol_bits": _is_int(self.symbol_bits) and FEWEST_BITS <= self.symbol_bits <= MOST_BITS,
            "rotation": self.rotation is None or (_is_int(self.rotation) and self.rotation >= 1),
            "seed": self.seed is None if self.rotation is None else _is_int(self.seed),
        }

    def packed(self, out_features: int, in_features: int, value_dtype: torch.dtype) -> SymbolSpec:
        """As `ModuleSpec.packed`."""
        rotation = None
        if self.rotation is not None and self.seed is not None:
            rotation = Rotation(in_features, self.rotation, self.seed)
        return SymbolSpec(out_features, in_features, self.symbol_bits, rotation)


@dataclass(frozen=True, kw_only=True)
class RowModule(ModuleSpec):
    """A layer that keeps some entries of every row.

    Attributes:
        kept: entries k kept per row.
        rank: rank of the factors.
        signs: ternary states (True) or a bitmap of positions (False).
        value_dtype: type of values and factors, where it is not the checkpoint's.
        value_bits: bits of a code if the values lie on a grid (formats 2 to 5), else None.
        group_size: columns that share a scale of the grid, else None.
        grid_dtype: type of magnitudes on the grid, where that is not FP16.
    """

    kept: int
    rank: int
    signs: bool
    value_dtype: str | None = None
    value_bits: int | None = None
    group_size: int | None = None
    grid_dtype: str | None = None

    def _checks(self) -> dict[str, bool]:
        coded = self.value_bits is not None
        return {
            "kept": _is_int(self.kept) and self.kept >= 0,
            "signs": self.signs is True or (self.signs is False and not coded),
            "rank": _is_int(self.rank) and (self.rank == 1 if coded else self.rank >= 0),
            "value_dtype": self.value_dtype is None or (self.value_dtype in VALUE_DTYPES and not coded),
            "value_bits": not coded or (_is_int(self.value_bits) and 1 <= (self.value_bits or 0) <= LARGEST_BITS),
            "group_size": (_is_int(self.group_size) and (self.group_size or 0) >= 1)
            if coded
            else self.group_size is None,
            "grid_dtype": self.grid_dtype is None or (coded and self.grid_dtype == _OLD_GRID),
        }

    def packed(self, out_features: int, in_features: int, value_dtype: torch.dtype) -> PackedSpec | CodedSpec:
        """As `ModuleSpec.packed`."""
        shape = out_features, in_features
        if self.kept > in_features:
            raise ValueError(f"keeps {self.kept} of the {in_features} entries of a row")
        if self.value_bits is None or self.group_size is None:
            own = value_dtype if self.value_dtype is None else getattr(torch, self.value_dtype)
            return PackedSpec(*shape, self.kept, self.rank, self.signs, own)
        grid_dtype = GRID_DTYPE if self.grid_dtype is None else getattr(torch, self.grid_dtype)
        return CodedSpec(*shape, self.kept, self.value_bits, self.group_size, value_dtype, grid_dtype)


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
        if format_version < FIRST_WITH_SYMBOLS:
            for name, spec in specs.items():
                if isinstance(spec, SymbolModule):
                    raise _damaged(f"is damaged: {name!r} has symbols, which format {format_version} has not", "")
        if format_version < FIRST_WITH_FP16_GRID and value_dtype == _OLD_GRID:
            # An old file means the numbers that were measured when it was written.
            specs = {name: _on_old_grid(spec) for name, spec in specs.items()}
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
            name: {key: value for key, value in spec.to_dict().items() if key not in _ERRORS}
            for name, spec in self.modules.items()
        }
        return json_digest({"modules": modules, "value_dtype": self.value_dtype})


def _on_old_grid(spec: ModuleSpec) -> ModuleSpec:
    if isinstance(spec, RowModule) and spec.value_bits is not None:
        return replace(spec, grid_dtype=_OLD_GRID)
    return spec


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


def check_parts(description: Description, pieces: Mapping[str, Piece], where: Path) -> dict[str, Spec]:
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


def _check_layer(name: str, module: ModuleSpec, dtype: torch.dtype, pieces: Mapping[str, Piece], where: Path) -> Spec:
    left, right = (_piece(pieces, f"{name}.{part}", where).shape for part in ("left", "right"))
    if len(left) != 2 or len(right) != 2:
        raise SlabError(f"{where}: a factor of {name!r} is no matrix: {WAY_OUT}")
    try:
        spec = module.packed(left[0], right[1], dtype)
    except ValueError as error:
        raise SlabError(f"{where}: config.json is wrong about {name!r}: {error}: {WAY_OUT}") from error
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
