"""How much memory this process has needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path


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


def human_bytes(count: float) -> str:
    """A byte count in decimal units, three digits: 227672272 → ``228 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
