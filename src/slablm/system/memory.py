"""How much memory this process has needed, and sizes as users read and write them."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from slablm.errors import SlabError

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_LARGEST_ON_HEAP = 32 << 20


def peak_resident_bytes() -> int | None:
    """Largest resident set of this process so far, in bytes; None where the system does not tell."""
    # On Linux getrusage also counts the memory of the process that started this one; VmHWM does not.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int | None:
    """Resident set of this process now, in bytes, mapped files included; None where there is no /proc."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return None
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Return freed memory to the system.

    glibc keeps blocks below 32 MB for later. When tensors of several sizes take turns, as in a model, what it keeps
    fits the next one badly and grows: by 100 MB over a few layers where the largest tensor has 12 MB.
    """
    if (trim := _c_function("malloc_trim")) is not None:
        trim(0)


@contextmanager
def mapped_apart(above: int = 64 << 10) -> Iterator[None]:
    """Within it, glibc maps all but small pieces one by one, so that each goes back as soon as it is freed.

    For code that takes large pieces for a moment and small ones for good: on a heap the small ones would come to lie
    behind the large ones, and what is in front of them could not be given back.

    Args:
        above: bytes from which a piece is not small. Every piece that is mapped costs a call and its pages anew.
    """
    limit = _c_function("mallopt")
    if limit is not None:
        limit(_MMAP_THRESHOLD, above)
    try:
        yield
    finally:
        if limit is not None:  # where glibc's own rule soon arrives, and it cannot be switched on again
            limit(_MMAP_THRESHOLD, _LARGEST_ON_HEAP)


@cache
def _c_function(name: str) -> Callable[..., int] | None:
    """A function of glibc; not every C library has it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def human_bytes(count: float) -> str:
    """A byte count in decimal units, three digits: 227672272 → ``228 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def parse_bytes(text: str, what: str) -> int:
    """A size as a user writes it: ``4GB``, ``500 MB``, ``2GiB`` or a number of bytes.

    Args:
        text: the size.
        what: how the error calls it.

    Raises:
        SlabError: it is not understood, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise SlabError(f"{what} {text!r} is no size: write it like 4GB, 500MB or 2GiB")
    power = ("", "k", "m", "g", "t").index(match[2].lower())
    count = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if count < 1:
        raise SlabError(f"{what} must be at least one byte, got {text!r}")
    return count
