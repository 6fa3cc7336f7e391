"""What `config.json` says about one compressed layer, checked, and what the layer's tensors must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch

from slablm.checkpoint.files import WAY_OUT
from slablm.config import VALUE_DTYPES
from slablm.errors import SlabError
from slablm.methods.rotation import Rotation
from slablm.methods.symbols import FEWEST_BITS, MOST_BITS
from slablm.packing import GRID_DTYPE, CodedSpec, PackedSpec, Spec, SymbolSpec
from slablm.packing.coded import LARGEST_BITS

# What magnitudes on a grid were rounded to before they became FP16 numbers in every model.
OLD_GRID = "bfloat16"
# Of errors, in config.json.
DECIMALS = 6


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
            raise damaged(f"modules is damaged: {name!r} is no object")
        form = SymbolModule if "symbol_bits" in entry else RowModule
        known = {field.name: field.default is MISSING for field in fields(form)}
        if unknown := sorted(map(str, entry.keys() - known)):
            raise damaged(f"modules is damaged: {name!r} has an unknown entry {unknown[0]!r}")
        for key, needed in known.items():
            if needed and key not in entry:
                raise damaged(f"modules is damaged: {name!r} has no {key!r}")
        spec = form(**entry)
        errors = {
            "output_error": is_finite(spec.output_error),
            "unseen_error": spec.unseen_error is None or is_finite(spec.unseen_error),
        }
        for key, right in (spec._checks() | errors).items():
            if not right:
                raise damaged(f"modules is damaged: {key!r} of {name!r} is {getattr(spec, key)!r}")
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

    def shape_in(self, shape_of: Callable[[str], tuple[int, ...]]) -> tuple[int, int]:
        """(m, n) of the layer.

        Args:
            shape_of: gives the shape of a part in the files.

        Raises:
            ValueError: the part that tells has another number of dimensions.
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
        output_error = round(output_error, DECIMALS)
        unseen_error = None if unseen_error is None else round(unseen_error, DECIMALS)
        if isinstance(spec, SymbolSpec):
            return SymbolModule(
                output_error=output_error,
                unseen_error=unseen_error,
                symbol_bits=spec.bits,
                in_features=spec.in_features,
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
        in_features: n; tiles are filled up, so no tensor tells.
        rotation: block of the rotation of the inputs; None if there is none.
        seed: of its signs.
    """

    symbol_bits: int
    in_features: int
    rotation: int | None = None
    seed: int | None = None

    def _checks(self) -> dict[str, bool]:
        return {
            "symbol_bits": is_int(self.symbol_bits) and FEWEST_BITS <= self.symbol_bits <= MOST_BITS,
            "in_features": is_int(self.in_features) and self.in_features >= 1,
            "rotation": self.rotation is None or (is_int(self.rotation) and self.rotation >= 1),
            "seed": self.seed is None if self.rotation is None else is_int(self.seed),
        }

    def packed(self, out_features: int, in_features: int, value_dtype: torch.dtype) -> SymbolSpec:
        """As `ModuleSpec.packed`."""
        rotation = None
        if self.rotation is not None and self.seed is not None:
            rotation = Rotation(in_features, self.rotation, self.seed)
        return SymbolSpec(out_features, in_features, self.symbol_bits, rotation)

    def shape_in(self, shape_of: Callable[[str], tuple[int, ...]]) -> tuple[int, int]:
        """As `ModuleSpec.shape_in`."""
        (out_features,) = shape_of("scales")
        return out_features, self.in_features


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
            "kept": is_int(self.kept) and self.kept >= 0,
            "signs": self.signs is True or (self.signs is False and not coded),
            "rank": is_int(self.rank) and (self.rank == 1 if coded else self.rank >= 0),
            "value_dtype": self.value_dtype is None or (self.value_dtype in VALUE_DTYPES and not coded),
            "value_bits": not coded or (is_int(self.value_bits) and 1 <= (self.value_bits or 0) <= LARGEST_BITS),
            "group_size": (is_int(self.group_size) and (self.group_size or 0) >= 1)
            if coded
            else self.group_size is None,
            "grid_dtype": self.grid_dtype is None or (coded and self.grid_dtype == OLD_GRID),
        }

    def shape_in(self, shape_of: Callable[[str], tuple[int, ...]]) -> tuple[int, int]:
        """As `ModuleSpec.shape_in`."""
        (out_features, _), (_, in_features) = shape_of("left"), shape_of("right")
        return out_features, in_features

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


def read_names(key: str, names: Any, modules: Container[str]) -> tuple[str, ...]:
    """Read an entry that lists modules of another kind than the compressed layers, in alphabetical order.

    Args:
        key: of the entry.
        names: anything; None where there is no entry.
        modules: the compressed layers.

    Raises:
        SlabError: it is no list of names, or names a compressed layer.
    """
    if names is None:
        return ()
    if not isinstance(names, list | tuple) or not names:
        raise damaged(f"{key} is damaged: it is no list of names")
    for name in names:
        if not isinstance(name, str) or not name or names.count(name) > 1 or name in modules:
            raise damaged(f"{key} is damaged: {name!r} is no name of a module, or has another entry")
    return tuple(sorted(names))


def is_int(value: Any) -> bool:
    """A whole number, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """A finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_size(value: Any) -> bool:
    """A finite number that is not negative."""
    return is_finite(value) and value >= 0


def damaged(what: str, dot: str = ".") -> SlabError:
    """The error for something that no slablm wrote in `quantization_config`."""
    return SlabError(f"config.json: quantization_config{dot or ' '}{what}: {WAY_OUT}")
