"""A hidden folder beside the target in which a result is put together, and which no dead process leaves for good.

    .OUT.partial-xxxxxxxx/lock     held by the process that writes
    .OUT.partial-xxxxxxxx/model/   what moves to OUT

Whether its writer lives is told by the lock and not by a process number: in a container every process is number 1.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from filelock import FileLock, Timeout

from slablm.errors import SlabError

_LOCK = "lock"
_ATTEMPTS = 10


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, removed at the end if it has not moved away.

    Raises:
        SlabError: it cannot be made.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out)
        place, lock = _locked_folder(out)
        try:
            (place / "model").mkdir()
        except OSError:
            _remove(place, lock)
            raise
    except OSError as error:
        raise SlabError(f"cannot write to {out.parent}: {error.strerror or error}") from error
    try:
        yield place / "model"
    finally:
        _remove(place, lock)


def doomed_name(out: Path) -> Path:
    """A name for what is to be deleted: should this process be killed before, the next one does it."""
    return out.parent / f"{_prefix(out)}{secrets.token_hex(4)}"


def remove_abandoned(out: Path) -> None:
    """Delete staging folders whose lock nobody holds."""
    for folder in out.parent.glob(f"{escape(_prefix(out))}*"):
        lock = _try_lock(folder)
        if lock is not None:
            _remove(folder, lock)


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _locked_folder(out: Path) -> tuple[Path, FileLock]:
    """A new folder and its lock. Before it is locked it looks abandoned, and another process may remove it."""
    for _ in range(_ATTEMPTS):
        place = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
        lock = _try_lock(place)
        if lock is not None:
            return place, lock
    raise OSError(f"{place} cannot be locked")


def _try_lock(folder: Path) -> FileLock | None:
    """The lock of a folder, or None if somebody holds it, or it cannot be had."""
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):  # held; somebody else's folder; just removed
        return None
    if (folder / _LOCK).exists():
        return lock
    lock.release()
    return None


def _remove(folder: Path, lock: FileLock) -> None:
    """Remove a folder that this process has locked. The lock's file goes last, and only when it is free on Windows."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    lock.release()
    shutil.rmtree(folder, ignore_errors=True)
