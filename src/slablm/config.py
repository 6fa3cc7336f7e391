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
CHAT = "chat:"  # in front of a file of conversations
VALUE_DTYPES = ("float16", "bfloat16")
HEAD_BITS = (16, 8)
# What `slab+` was before format 6 (kept positions and codes), in the settings of checkpoints that it has made.
FORMER_SLAB_PLUS = "slab+1"
_FORMER_SETTINGS = ("magnitude_bits", "refine")
_SIZES = ("ratio", "bits_per_weight")
DEFAULT_RATIO, DEFAULT_BITS = 0.5, 4.0
LEAST_BUDGET = 2.0
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
        if "@" not in text or cls(text).file.exists():
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
    def is_chat(self) -> bool:
        """Whether the source is a file of conversations."""
        return self.source.startswith(CHAT)

    @property
    def file(self) -> Path:
        """Where the text lies, if it is none of the known sources."""
        return Path(self.source.removeprefix(CHAT))

    @property
    def name(self) -> str:
        """What tables call it: without folders."""
        return str(replace(self, source=CHAT * self.is_chat + self.file.name))

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
        method: name of the algorithm, a key of `slablm.methods.METHODS`. ``slab`` is the paper's, with a sparse matrix
            of 16-bit values; ``slab+`` gives each weight one symbol of 2 to 6 bits, which is far smaller.
        ratio: the paper's compression ratio CR in (0, 1): the share of the FP16 bits that is removed. The paper counts
            values, sign bits and factors; positions are free (the true size is reported beside it, always). None for
            0.5, and with `slab+`, which has `bits_per_weight` in its place; without meaning for the quantizers.
        pattern: ``"unstructured"`` or ``"N:M"``, N of every M consecutive inputs survive at most.
        rank: rank r of the low-rank matrix W_L.
        iterations: rounds s of the alternating minimisation.
        bits_per_weight: true bits per weight of the packed tensors, of `slab+` only (None for 4). It is the most that a
            block's layers have together: each gets symbols of more or fewer bits as the block is sensitive to it.
        value_bits: bits of a code, 2 to 8; used by the quantizers (`rtn`, `gptq`, `awq`) only.
        group_size: columns of a row that share a scale; of the quantizers only.
        calibration: ``c4``, ``wikitext2``, ``self``, ``builtin``, the path of a text file, or ``chat:`` and that of a
            file of conversations; perhaps with a range of windows (`Excerpt`).
        num_samples: number of calibration windows.
        seq_len: tokens per calibration window.
        bos: whether each window begins with a BOS token, where the tokenizer begins texts with one.
        targets: modules to compress: ``"all-linear"``, a module name or name suffix, or ``"re:"`` and a pattern.
        ignore: modules to leave dense, same syntax; wins over `targets`.
        value_dtype: stored type of values and factors, ``float16`` or ``bfloat16`` (None: by the model's dtype).
        head_bits: bits of a weight of embedding and head: 16, or 8 for int8 rows with a scale each.
        seed: seed of everything that is sampled.

    Raises:
        SlabError: a setting is out of range; the message names it.
    """

    method: str = "slab+"
    ratio: float | None = None
    pattern: str = "unstructured"
    rank: int = 1
    iterations: int = 20
    bits_per_weight: float | None = None
    value_bits: int = 4
    group_size: int = 128
    calibration: str = "c4"
    num_samples: int = 128
    seq_len: int = 2048
    bos: bool = True
    targets: tuple[str, ...] = (ALL_LINEAR,)
    ignore: tuple[str, ...] = ()
    value_dtype: str | None = None
    head_bits: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        # JSON turns tuples into lists; accept both so that a saved config reads back equal.
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "ignore", tuple(self.ignore))
        for name in ("rank", "iterations", "group_size", "num_samples"):
            if getattr(self, name) < 1:
                raise SlabError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 2 <= self.value_bits <= 8:
            raise SlabError(f"value_bits must lie between 2 and 8, got {self.value_bits}")
        self._check_size()
        if self.seq_len < 2:
            raise SlabError(f"seq_len must be at least 2 tokens, got {self.seq_len}")
        if not -(2**62) < self.seed < 2**62:  # torch's have 64 bits, and some are counted on from this one
            raise SlabError(f"seed must lie between -2**62 and 2**62, got {self.seed}")
        if not self.targets:
            raise SlabError("targets is empty: name at least one module or use 'all-linear'")
        if self.value_dtype is not None and self.value_dtype not in VALUE_DTYPES:
            raise SlabError(f"value_dtype must be one of {', '.join(VALUE_DTYPES)}, got {self.value_dtype!r}")
        if self.head_bits not in HEAD_BITS:
            raise SlabError(f"head_bits must be 16 or 8, got {self.head_bits}")
        Pattern.parse(self.pattern)

    def _check_size(self) -> None:
        """Fill in what says how large the result is, and refuse what the method would not heed."""
        if self.method != "slab+":
            if self.bits_per_weight is not None and self.method != FORMER_SLAB_PLUS:
                raise SlabError(f"bits_per_weight needs method 'slab+', got {self.method!r}: give a ratio")
            ratio = DEFAULT_RATIO if self.ratio is None else self.ratio
            if not 0 < ratio < 1:
                raise SlabError(f"ratio must lie strictly between 0 and 1, got {ratio}")
            object.__setattr__(self, "ratio", ratio)
            return
        if self.ratio is not None:
            raise SlabError(
                f"ratio {self.ratio} needs another method, such as 'slab': method 'slab+' has a size in true bits per "
                "weight (--bits-per-weight)"
            )
        if self.rank != 1:
            raise SlabError(f"method 'slab+' has rank 1, got rank {self.rank}: use method 'slab'")
        if self.pattern != "unstructured":
            raise SlabError(f"method 'slab+' has no pattern, got {self.pattern}: use method 'slab'")
        budget = DEFAULT_BITS if self.bits_per_weight is None else self.bits_per_weight
        if not LEAST_BUDGET < budget < math.inf:
            raise SlabError(f"bits_per_weight must lie above {LEAST_BUDGET:g}, got {budget}")
        object.__setattr__(self, "bits_per_weight", budget)

    @property
    def n_of_m(self) -> Pattern | None:
        """The parsed `pattern`, None when unstructured."""
        return Pattern.parse(self.pattern)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready types; of ratio and bits per weight the one that means something."""
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in settings.items() if key not in _SIZES or value is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CompressionConfig:
        """Inverse of `to_dict`.

        Raises:
            SlabError: an unknown setting, probably written by a newer slablm.
        """
        if not isinstance(data, dict):
            raise SlabError(f"compression settings are damaged: {data!r} is no JSON object")
        if "ratio" in data and data.get("method") == "slab+":
            data = {**data, "method": FORMER_SLAB_PLUS}
        if data.get("method") == FORMER_SLAB_PLUS:
            data = {key: value for key, value in data.items() if key not in _FORMER_SETTINGS}
        types = {field.name: str(field.type) for field in fields(cls)}
        unknown = sorted(map(str, set(data) - set(types)))
        if unknown:
            raise SlabError(f"unknown compression setting {unknown[0]!r}: made by a newer slablm? Please upgrade")
        for name, value in data.items():
            if not any(_FITS[wanted](value) for wanted in types[name].split(" | ")):
                raise SlabError(f"compression setting {name!r} must be {_NAMES[types[name]]}, got {value!r}")
        return cls(**{"bos": False, **data})  # settings that do not know of it are older
