"""What an unfinished run has achieved so far, so that a kill costs one block and not the night.

Beside the target OUT lies a hidden folder, ``.OUT.unfinished``, with

    lock                      held by the process that works on OUT
    fingerprint.json          what the run was made with: model, calibration tokens, settings, versions
    outside-*.safetensors     tensors outside the blocks, as they will be stored
    block-*.safetensors       one finished block each: packed tensors and what else it has, digests, reports
    model/                    the result while it is put together
    publish.json              the result is complete and is moving to OUT

Every file is written under another name, synced and renamed, so a file that is there is complete, even after a power
loss. The hidden states are not kept: to go on, the finished blocks are run once more, which gives the same bits on the
same machine, costs one forward pass per block and no disk (the states of all windows may be larger than the model).
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from slablm.checkpoint import integrity
from slablm.checkpoint.shards import Piece, TensorFile, sync, sync_folder, write_tensors
from slablm.checkpoint.staging import doomed_name
from slablm.compression.fingerprint import differences
from slablm.errors import SlabError

_RECORD = "record"


class Journal:
    """The folder of one unfinished run; made by `open_journal`.

    Args:
        folder: the folder, which exists and is locked by this process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.accepted = False

    @property
    def model_folder(self) -> Path:
        """Where the result is put together."""
        return self.folder / "model"

    @property
    def done(self) -> int:
        """Number of finished blocks: those without a gap from the first."""
        count = 0
        while self._file(block_key(count)).is_file():
            count += 1
        return count

    def accept(self, fingerprint: Mapping[str, str]) -> None:
        """Begin, or go on if the run was begun with the same inputs; damaged blocks are thrown away.

        Args:
            fingerprint: everything the result depends on, by the name an error should use.

        Raises:
            SlabError: the run was begun with another fingerprint; the difference is named.
        """
        path = self.folder / "fingerprint.json"
        if not path.is_file():
            self.write_json("fingerprint.json", fingerprint)
        self._compare(json.loads(path.read_text(encoding="utf-8")), fingerprint)
        self.accepted = True
        self._drop_damaged()

    def put(self, key: str, tensors: Mapping[str, Tensor], notes: Any = None) -> None:
        """Keep tensors and notes under a key, for good.

        Args:
            key: `block_key` or `outside_key`.
            tensors: tensors by full name, as they will be stored.
            notes: anything that JSON can hold.
        """
        digests = {name: integrity.digest(tensor) for name, tensor in tensors.items()}
        metadata = {_RECORD: json.dumps({"digests": digests, "notes": notes})}
        temporary = self._file(key).with_suffix(".tmp")
        write_tensors(temporary, {name: Piece.of(tensor) for name, tensor in tensors.items()}, metadata)
        temporary.replace(self._file(key))
        sync_folder(self.folder)

    def has(self, key: str) -> bool:
        """Whether something is kept under this key."""
        return self._file(key).is_file()

    def pieces(self, key: str) -> dict[str, Piece]:
        """The tensors under a key."""
        return TensorFile.open(self._file(key)).pieces

    def notes(self, key: str) -> Any:
        """The notes under a key."""
        return self._record(key)["notes"]

    def everything(self) -> tuple[dict[str, Piece], dict[str, str]]:
        """All tensors kept, and their digests, by full name."""
        pieces: dict[str, Piece] = {}
        digests: dict[str, str] = {}
        for path in sorted(self.folder.glob("*-*.safetensors")):
            pieces |= self.pieces(path.stem)
            digests |= self._record(path.stem)["digests"]
        return pieces, digests

    def write_json(self, name: str, data: Any) -> None:
        """Write a small file that is there completely or not at all."""
        temporary = self.folder / f"{name}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=2)
            sync(file)
        temporary.replace(self.folder / name)
        sync_folder(self.folder)

    def remove(self) -> None:
        """Throw everything away. First the name goes, so that a kill in between leaves nothing to go on with."""
        doomed = doomed_name(self.folder.with_name(self.folder.name.removesuffix(".unfinished")[1:]))
        if self.folder.is_dir():
            self.folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _record(self, key: str) -> dict[str, Any]:
        record = json.loads(TensorFile.open(self._file(key)).metadata[_RECORD])
        assert isinstance(record, dict)
        return record

    def _compare(self, before: dict[str, str], now: Mapping[str, str]) -> None:
        if found := differences(before, now):
            raise SlabError(
                f"the unfinished run was begun with another {found}: "
                f"go back to that, or delete {self.folder} to start anew"
            )

    def _drop_damaged(self) -> None:
        """Keep what its digests confirm; of the blocks only those before the first damaged one."""
        for path in sorted(self.folder.glob("outside-*.safetensors")):
            if not self._sound(path.stem):
                path.unlink()
        sound = 0
        while self.has(block_key(sound)) and self._sound(block_key(sound)):
            sound += 1
        for path in self.folder.glob("block-*.safetensors"):
            if path.stem >= block_key(sound):
                path.unlink()

    def _sound(self, key: str) -> bool:
        try:
            digests = self._record(key)["digests"]
            return all(integrity.digest(piece) == digests[name] for name, piece in self.pieces(key).items())
        except (SlabError, KeyError, ValueError):
            return False


def unfinished_folder(out: Path) -> Path:
    """Where the journal of a target folder is."""
    return out.parent / f".{out.name}.unfinished"


def block_key(index: int) -> str:
    """Key of a block in the journal; sorts by number."""
    return f"block-{index:05d}"


def outside_key(index: int) -> str:
    """Key of the tensor outside the blocks with this number."""
    return f"outside-{index:05d}"


@contextmanager
def open_journal(out: Path, *, resume: bool) -> Iterator[Journal]:
    """The journal for a target folder, locked against other processes.

    When the run fails, what it has finished stays; with nothing finished, nothing stays.

    Args:
        out: the target folder.
        resume: whether an unfinished run may be continued.

    Raises:
        SlabError: another process works on `out`; there is an unfinished run and `resume` is not set; the disk is full
            or not writable.
    """
    folder = unfinished_folder(out)
    with _complain(out, lambda: ""):
        lock = _lock(folder, out)
    journal = Journal(folder)
    try:
        done = journal.done
        if done and not resume:
            raise SlabError(
                f"an unfinished run for {out} is in {folder} ({done} blocks are done): "
                "continue it with --resume, or delete that folder to start anew"
            )
        if not done:
            _clear(folder)
        with _complain(out, lambda: _way_on(journal)):
            yield journal
    finally:
        if not journal.done:
            journal.remove()
        lock.release()


def _lock(folder: Path, out: Path) -> FileLock:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SlabError(f"another process is compressing into {out}: wait for it, or choose another folder") from None
    if not path.exists():  # its owner removed the folder after this process had opened the lock
        lock.release()
        raise SlabError(f"another process has just finished {out}: look at it, then try again")
    return lock


def _clear(folder: Path) -> None:
    """Remove what a run without a finished block has left."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _way_on(journal: Journal) -> str:
    done = journal.done if journal.accepted else 0
    return f"; {done} finished blocks are kept, run the same command with --resume to go on" if done else ""


@contextmanager
def _complain(out: Path, way_on: Callable[[], str]) -> Iterator[None]:
    """Turn what the disk has against us into one line, and say what is kept."""
    try:
        yield
    except SlabError as error:
        kept = way_on()
        raise SlabError(f"{error}{kept}") if kept else error from None
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
        raise SlabError(f"writing {out} failed, nothing was changed there: {reason}{way_on()}") from error
