"""The hidden states of all calibration windows, in a bounded amount of memory.

Between two blocks there is one hidden state per window, all of one shape: windows × seq_len × hidden_size values. The
first windows stay in RAM, as many as the limit allows; the others live in a memory-mapped file. Their pages are given
back after every access, so they never count as this process's memory. The bits are the same wherever a window lives.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from slablm.checkpoint.shards import byte_view


class Activations:
    """A list of equally shaped tensors that are replaced one by one.

    Args:
        count: number of windows.
        max_bytes: bytes that may stay in RAM; None for all.
        folder: where the file for the others is made; the system's temporary folder by default. It has no name there
            and vanishes with this process.

    Raises:
        OSError: the file does not fit on the disk.
    """

    def __init__(self, count: int, max_bytes: int | None = None, folder: Path | None = None) -> None:
        self._count, self._max_bytes, self._folder = count, max_bytes, folder
        self._kept: list[Tensor] = []
        self._file: _WindowFile | None = None
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self._kept) + (0 if self._file is None else self._file.used)

    def append(self, states: Tensor) -> None:
        """Add the next window's hidden states."""
        self._device = states.device
        states = states.cpu()
        if self._file is None and (self._max_bytes is None or (len(self._kept) + 1) * states.nbytes <= self._max_bytes):
            self._kept.append(states)
            return
        if self._file is None:
            self._file = _WindowFile(states, self._count - len(self._kept), self._folder)
        self._file.used += 1
        self[len(self) - 1] = states

    def __getitem__(self, index: int) -> Tensor:
        if index < len(self._kept):
            return self._kept[index].to(self._device)
        if self._file is None or index >= len(self):
            raise IndexError(index)
        return self._file.read(index - len(self._kept)).to(self._device)

    def __setitem__(self, index: int, states: Tensor) -> None:
        if index < len(self._kept):
            # In place: a new tensor would lie anywhere in the heap, and what it leaves behind cannot be given back.
            self._kept[index].copy_(states)
        elif self._file is None:
            raise IndexError(index)
        else:
            self._file.write(index - len(self._kept), states.cpu())

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


class _WindowFile:
    """Windows in a memory-mapped file.

    Args:
        example: a tensor of the type and shape of every window.
        count: number of windows.
        folder: where the file is made.
    """

    def __init__(self, example: Tensor, count: int, folder: Path | None) -> None:
        self._shape, self._dtype, self._bytes = example.shape, example.dtype, example.nbytes
        # Whole pages, so that the pages of one window can be given back alone.
        self._stride = -(-example.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.used = 0
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), count * self._stride)
            self._map = mmap.mmap(file.fileno(), count * self._stride)

    def write(self, index: int, states: Tensor) -> None:
        start = index * self._stride
        memoryview(self._map)[start : start + self._bytes] = byte_view(states.contiguous())
        self._give_back(start)

    def read(self, index: int) -> Tensor:
        start = index * self._stride
        states = torch.empty(self._shape, dtype=self._dtype)
        byte_view(states)[:] = memoryview(self._map)[start : start + self._bytes]
        self._give_back(start)
        return states

    def _give_back(self, start: int) -> None:
        """Drop the window's pages from this process; what was written stays in the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, self._stride)


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its blocks on the disk now: a full disk behind a memory map is no exception but a fatal signal."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    with os.fdopen(os.dup(descriptor), "wb") as file:  # macOS, Windows
        for start in range(0, size, 1 << 20):
            file.write(bytes(min(1 << 20, size - start)))
