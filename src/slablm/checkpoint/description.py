"""What `config.json` says about the compressed layers, checked: types, ranges, and the headers of the files.

It decides how bytes are decoded: with another `seed` the same symbols are another weight. So nothing here is believed
before its type and range are known and every part of every layer has the shape and type in the files that the
description gives it. What no shape can tell (a rotation and its seed) is covered by a digest in the files' headers
since format version 4 (`Description.digest`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from slablm.checkpoint.config_file import json_digest
from slablm.checkpoint.entries import (
    DECIMALS,
    OLD_GRID,
    ModuleSpec,
    RowModule,
    SymbolModule,
    damaged,
    is_size,
    read_names,
)
from slablm.checkpoint.files import WAY_OUT
from slablm.checkpoint.guard import (
    FIRST_WITH_EXPERTS,
    FIRST_WITH_FP16_GRID,
    FIRST_WITH_INT8_ROWS,
    FIRST_WITH_SIX_BITS,
    FIRST_WITH_SYMBOLS,
    UNRELEASED_SYMBOLS,
    check_version,
    written_version,
)
from slablm.checkpoint.shards import DTYPES, Piece
from slablm.config import VALUE_DTYPES
from slablm.errors import SlabError
from slablm.methods.drift import Drift
from slablm.packing import Spec

_PLANES = (".states", ".positions", ".symbols")  # one of them is there in every compressed layer, and in no other
_ERRORS = ("output_error", "unseen_error")
_SIX_BITS = 6


@dataclass(frozen=True)
class Description:
    """All that decides how the compressed layers of a checkpoint are decoded.

    Attributes:
        modules: full name → what is stored of it.
        value_dtype: ``float16`` or ``bfloat16``.
        format_version: as `config.json` says.
        int8_rows: full names of the modules whose matrix is stored in int8 rows.
        experts: full names of the modules whose experts are stored one by one.
    """

    modules: Mapping[str, ModuleSpec]
    value_dtype: str
    format_version: int
    int8_rows: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()

    @classmethod
    def from_json(
        cls, modules: Any, value_dtype: Any, format_version: Any, int8_rows: Any = None, experts: Any = None
    ) -> Description:
        """Read the entries of ``quantization_config``; modules that are `ModuleSpec` already are taken as they are.

        Raises:
            SlabError: see `check_version`, `ModuleSpec.from_json` and `read_names`; the value type is none, or the
                version has no such list.
        """
        check_version(format_version)
        if not isinstance(modules, dict) or not modules or value_dtype not in VALUE_DTYPES:
            raise damaged("is damaged (modules or value_dtype missing or wrong)", "")
        for name in modules:
            if not isinstance(name, str) or not name:
                raise damaged(f"modules is damaged: {name!r} is no name of a layer")
        if format_version < FIRST_WITH_SYMBOLS:
            _check_no_symbols(modules, format_version)
        specs = {
            name: entry if isinstance(entry, ModuleSpec) else ModuleSpec.from_json(name, entry)
            for name, entry in modules.items()
        }
        if format_version < FIRST_WITH_FP16_GRID and value_dtype == OLD_GRID:
            # An old file means the numbers that were measured when it was written.
            specs = {name: _on_old_grid(spec) for name, spec in specs.items()}
        for key, names, first in (
            ("int8_rows", int8_rows, FIRST_WITH_INT8_ROWS),
            ("experts", experts, FIRST_WITH_EXPERTS),
        ):
            if names is not None and format_version < first:
                raise damaged(f"is damaged: it has {key}, which format {format_version} has not", "")
        if format_version < FIRST_WITH_SIX_BITS and _six_bits(specs):
            raise damaged(f"is damaged: it has symbols of 6 bits, which format {format_version} has not", "")
        rows, apart = read_names("int8_rows", int8_rows, specs), read_names("experts", experts, specs)
        return cls(specs, value_dtype, format_version, rows, apart)

    @classmethod
    def of_config(cls, quantization_config: Mapping[str, Any]) -> Description:
        """Read a ``quantization_config``; see `from_json`."""
        keys = ("modules", "value_dtype", "format_version", "int8_rows", "experts")
        return cls.from_json(*(quantization_config.get(key) for key in keys))

    @property
    def written_version(self) -> int:
        """Of what is written: the first that has all that there is."""
        return version_of(self.modules, self.experts)

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
        lists = {key: list(names) for key, names in self.lists.items()}
        return json_digest({"modules": modules, "value_dtype": self.value_dtype, **lists})

    @property
    def lists(self) -> dict[str, tuple[str, ...]]:
        """The lists of modules of other kinds, by their keys; those that are not empty."""
        return {key: names for key in ("int8_rows", "experts") if (names := getattr(self, key))}


def _on_old_grid(spec: ModuleSpec) -> ModuleSpec:
    if isinstance(spec, RowModule) and spec.value_bits is not None:
        return replace(spec, grid_dtype=OLD_GRID)
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
        raise damaged("drift is damaged: it is no list")
    return tuple(_read_block(index, entry) for index, entry in enumerate(entries))


def drift_entry(drift: Drift) -> dict[str, float]:
    """What is said about the drift behind a block, rounded to six decimals."""
    return {name: round(value, DECIMALS) for name, value in asdict(drift).items()}


def _read_block(index: int, entry: Any) -> Drift:
    if isinstance(entry, Drift):
        return entry
    wanted = {field.name for field in fields(Drift)}
    if not isinstance(entry, dict) or entry.keys() != wanted or not all(map(is_size, entry.values())):
        raise damaged(f"drift is damaged: block {index} has {entry!r}")
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
    try:
        shape = module.shape_in(lambda part: _piece(pieces, f"{name}.{part}", where).shape)
    except SlabError:
        raise
    except ValueError:
        raise SlabError(
            f"{where}: factors or scales of {name!r} have a wrong number of dimensions: {WAY_OUT}"
        ) from None
    try:
        spec = module.packed(*shape, dtype)
    except ValueError as error:
        raise SlabError(f"{where}: config.json is wrong about {name!r}: {error}: {WAY_OUT}") from error
    for part, (part_shape, part_dtype) in spec.parts().items():
        piece = _piece(pieces, f"{name}.{part}", where)
        if piece.shape != part_shape or DTYPES[piece.dtype] != part_dtype:
            raise SlabError(
                f"{where}: tensor '{name}.{part}' is {piece.dtype} {list(piece.shape)}, config.json says "
                f"{str(part_dtype).removeprefix('torch.')} {list(part_shape)}: {WAY_OUT}"
            )
    return spec


def version_of(modules: Mapping[str, ModuleSpec], experts: Sequence[str]) -> int:
    """The version of a `Description` that is to be written."""
    return written_version(bool(experts), _six_bits(modules))


def _six_bits(modules: Mapping[str, ModuleSpec]) -> bool:
    return any(isinstance(spec, SymbolModule) and spec.symbol_bits == _SIX_BITS for spec in modules.values())


def _piece(pieces: Mapping[str, Piece], name: str, where: Path) -> Piece:
    if name not in pieces:
        raise SlabError(f"{where}: tensor {name!r} is missing: {WAY_OUT}")
    return pieces[name]


def _check_no_symbols(modules: Mapping[str, Any], format_version: int) -> None:
    """Refuse symbols in a version that had none, or those of another form."""
    for name, entry in modules.items():
        if isinstance(entry, SymbolModule) or (isinstance(entry, dict) and "symbol_bits" in entry):
            if format_version == UNRELEASED_SYMBOLS:
                raise SlabError(
                    f"{name!r} has symbols in the form of format {format_version}, which was never released and is not "
                    "read: compress the model again"
                )
            raise damaged(f"is damaged: {name!r} has symbols, which format {format_version} has not", "")
