"""What to do, as one frozen dataclass that validates itself and travels as JSON.

`CompressionConfig` holds every setting that changes the numbers in a compressed model. It is written into the
checkpoint (``config.json`` → ``quantization_config.compression``) so that a result can always be traced back to how
it was made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from slablm.errors import SlabError

ALL_LINEAR = "all-linear"
CALIBRATION_SOURCES = ("c4", "wikitext2", "self", "builtin")
VALUE_DTYPES = ("float16", "bfloat16")
FEW_BITS = ("bits_per_weight", "magnitude_bits")
LARGEST_BUDGET = 9.0
_RANGE = re.compile(r"(?P<source>.+)@(?P<first>\d+)(?P<open>-(?P<last>\d+)?)?(/(?P<spread>\d+))?")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


# What JSON may hold for a setting of each type, and how errors call that.
_FITS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": _is_whole,
    "float": lambda value: _is_whole(value) or (isinstance(value, float) and math.isfinite(value)),
    "bool": lambda value: isinstance(value, bool),
    "None": lambda value: value is None,
    "tuple[str, ...]": _is_texts,
}
_NAMES = {
    "str": "text",
    "str | None": "text or null",
    "int": "a whole number",
    "int | None": "a whole number or null",
    "float": "a number",
    "float | None": "a number or null",
    "bool": "true or false",
    "tuple[str, ...]": "a list of texts",
}


@dataclass(frozen=True)
class Pattern:
    """An N:M sparsity pattern: of every `group` consecutive inputs in a row at most `survivors` are kept."""

    survivors: int
    group: int

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """Read ``"unstructured"`` (None) or ``"N:M"``.

        Raises:
            SlabError: the text is neither.
        """
        if text == "unstructured":
            return None
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None:
            raise SlabError(f"pattern {text!r} is not understood: use 'unstructured' or N:M such as '2:4' or '4:8'")
        survivors, group = int(match[1]), int(match[2])
        if not 0 < survivors < group:
            raise SlabError(f"pattern {text!r} keeps {survivors} of every {group}: N must lie between 1 and M - 1")
        return cls(survivors, group)


@dataclass(frozen=True)
class Excerpt:
    """Some windows of a text.

    Attributes:
        source: as for `slablm.calibration.text.load_text`.
        first: number of the first window.
        last: number of the last, which is included; None for the text's last.
        spread: how many, spread evenly from the first to the last; None for all.
    """

    source: str
    first: int = 0
    last: int | None = None
    spread: int | None = None

    @classmethod
    def parse(cls, text: str) -> Excerpt:
        """Read ``TEXT``, ``TEXT@A``, ``TEXT@A-``, ``TEXT@A-B``, the last two perhaps with ``/N``.

        Raises:
            SlabError: the range is empty, or there is something else behind the last ``@`` than one.
        """
        if "@" not in text or Path(text).exists():
            return cls(text)
        found = _RANGE.fullmatch(text)
        if found is None:
            raise SlabError(f"{text!r}: windows of a text are given as TEXT@10-19, TEXT@10- or TEXT@10-/4")
        first = int(found["first"])
        last = first if found["open"] is None else None if found["last"] is None else int(found["last"])
        spread = None if found["spread"] is None else int(found["spread"])
        if (last is not None and last < first) or spread == 0:
            raise SlabError(f"{text!r} names no window: the first comes first, and of 1 on")
        return cls(found["source"], first, last, spread)

    def chosen(self, available: int) -> list[int]:
        """Numbers of the windows, ascending.

        Args:
            available: how many windows the text has.

        Raises:
            SlabError: it has too few.
        """
        stop = available if self.last is None else self.last + 1
        count = stop - self.first
        wanted = count if self.spread is None else self.spread
        if not 0 < wanted <= count or stop > available:
            raise SlabError(
                f"{self} needs more windows than there are: the text has {available}, numbered from 0; give more text, "
                "other windows or a shorter --seq-len"
            )
        return [self.first + i * count // wanted for i in range(wanted)]

    @property
    def name(self) -> str:
        """What tables call it: without folders."""
        return str(replace(self, source=Path(self.source).name))

    def __str__(self) -> str:
        if self == Excerpt(self.source):
            return self.source
        last = "" if self.last is None else self.last
        spread = "" if self.spread is None else f"/{self.spread}"
        return f"{self.source}@{self.first}-{last}{spread}"


@dataclass(frozen=True)
class CompressionConfig:
    """Settings of one compression run.

    Args:
        method: name of the algorithm, a key of `slablm.methods.METHODS`. ``slab`` is the paper's; ``slab+``, with the
            same form and size, was better in all that was measured (docs/results.md), and takes more time and memory.
        ratio: the paper's compression ratio CR in (0, 1): the share of the FP16 bits that is removed. The paper counts
            values, sign bits and factors; positions are free (the true size is reported beside it, always).
        pattern: ``"unstructured"`` or ``"N:M"``, N of every M consecutive inputs survive at most.
        rank: rank r of the low-rank matrix W_L.
        iterations: rounds s of the alternating minimisation.
        bits_per_weight: true bits per weight of the packed tensors; with `slab+` it takes the place of `ratio`, and
            kept entries and their bits are chosen for each layer. It is the mean within each block: layers get more or
            less as the block is sensitive to them.
        magnitude_bits: bits of a kept entry's magnitude, 1 to 7; used by `slab+` only (None: values in 16 bits).
        value_bits: bits of a code, 2 to 8; used by the quantizers (`rtn`, `gptq`, `awq`) only.
        group_size: columns of a row that share a scale; used with the two above only.
        calibration: ``c4``, ``wikitext2``, ``self``, ``builtin`` or the path of a text file, perhaps with a range of
            windows (`Excerpt`).
        num_samples: number of calibration windows.
        seq_len: tokens per calibration window.
        bos: whether each window begins with a BOS token, where the tokenizer begins texts with one.
        targets: modules to compress: ``"all-linear"``, a module name or name suffix, or ``"re:"`` and a pattern.
        ignore: modules to leave dense, same syntax; wins over `targets`.
        value_dtype: stored type of values and factors, ``float16`` or ``bfloat16`` (None: by the model's dtype).
        refine: whether the numbers of each block's layers are refined together (`slablm.compression.refinement`).
        seed: seed of everything that is sampled.

    Raises:
        SlabError: a setting is out of range; the message names it.
    """

    method: str = "slab+"
    ratio: float = 0.5
    pattern: str = "unstructured"
    rank: int = 1
    iterations: int = 20
    bits_per_weight: float | None = None
    magnitude_bits: int | None = None
    value_bits: int = 4
    group_size: int = 128
    calibration: str = "c4"
    num_samples: int = 128
    seq_len: int = 2048
    bos: bool = True
    targets: tuple[str, ...] = (ALL_LINEAR,)
    ignore: tuple[str, ...] = ()
    value_dtype: str | None = None
    refine: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        # JSON turns tuples into lists; accept both so that a saved config reads back equal.
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "ignore", tuple(self.ignore))
        if not 0 < self.ratio < 1:
            raise SlabError(f"ratio must lie strictly between 0 and 1, got {self.ratio}")
        for name in ("rank", "iterations", "group_size", "num_samples"):
            if getattr(self, name) < 1:
                raise SlabError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 2 <= self.value_bits <= 8:
            raise SlabError(f"value_bits must lie between 2 and 8, got {self.value_bits}")
        self._check_few_bits()
        if self.seq_len < 2:
            raise SlabError(f"seq_len must be at least 2 tokens, got {self.seq_len}")
        if not -(2**62) < self.seed < 2**62:  # torch's have 64 bits, and some are counted on from this one
            raise SlabError(f"seed must lie between -2**62 and 2**62, got {self.seed}")
        if not self.targets:
            raise SlabError("targets is empty: name at least one module or use 'all-linear'")
        if self.value_dtype is not None and self.value_dtype not in VALUE_DTYPES:
            raise SlabError(f"value_dtype must be one of {', '.join(VALUE_DTYPES)}, got {self.value_dtype!r}")
        Pattern.parse(self.pattern)

    def _check_few_bits(self) -> None:
        """Refuse settings of `slab+` that are out of range, or that another method would not heed."""
        for name in FEW_BITS:
            if getattr(self, name) is not None and self.method != "slab+":
                raise SlabError(f"{name} needs method 'slab+', got {self.method!r}")
        if self.method == "slab+" and self.rank != 1:
            raise SlabError(f"method 'slab+' has rank 1, got rank {self.rank}: use method 'slab'")
        if self.magnitude_bits is not None and not 1 <= self.magnitude_bits <= 7:
            raise SlabError(f"magnitude_bits must lie between 1 and 7, got {self.magnitude_bits}")
        if self.bits_per_weight is None:
            return
        if not 1 < self.bits_per_weight <= LARGEST_BUDGET:
            raise SlabError(
                f"bits_per_weight must lie above 1 and not above {LARGEST_BUDGET:g}, got {self.bits_per_weight}"
            )
        if self.pattern != "unstructured":
            raise SlabError(
                f"bits_per_weight chooses how many entries are kept: with pattern {self.pattern} use a ratio"
            )

    @property
    def n_of_m(self) -> Pattern | None:
        """The parsed `pattern`, None when unstructured."""
        return Pattern.parse(self.pattern)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready types; those of `slab+` and refinement only where they are set."""
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        unset = {key for key in FEW_BITS if settings[key] is None} | ({"refine"} if not self.refine else set())
        return {key: value for key, value in settings.items() if key not in unset}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CompressionConfig:
        """Inverse of `to_dict`.

        Raises:
            SlabError: an unknown setting, probably written by a newer slablm.
        """
        if not isinstance(data, dict):
            raise SlabError(f"compression settings are damaged: {data!r} is no JSON object")
        types = {field.name: str(field.type) for field in fields(cls)}
        unknown = sorted(map(str, set(data) - set(types)))
        if unknown:
            raise SlabError(f"unknown compression setting {unknown[0]!r}: made by a newer slablm? Please upgrade")
        for name, value in data.items():
            if not any(_FITS[wanted](value) for wanted in types[name].split(" | ")):
                raise SlabError(f"compression setting {name!r} must be {_NAMES[types[name]]}, got {value!r}")
        return cls(**{"bos": False, **data})  # settings that do not know of it are older
