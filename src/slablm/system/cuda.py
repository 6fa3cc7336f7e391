"""CUDA C++ compiled for the GPU at hand: NVRTC makes machine code of a text, the driver loads and launches it.

Both libraries are there wherever torch runs on a GPU: the driver with the device, NVRTC with torch. So no compiler has
to be installed. Machine code is kept in a folder of the user's cache, by a hash of all that it depends on.

A launch goes to torch's current stream and can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from slablm.errors import SlabError

# Where machine code is kept, instead of a folder in the user's cache.
CACHE_VARIABLE = "SLABLM_CACHE"
_OPTIONS = ("--std=c++17", "-default-device")
# What a block gets of shared memory without asking for more: 48 KiB, the kernel's own variables included.
_SHARED_BYTES = 32 << 10
_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an identifier, and a value in 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class Kernel:
    """One ``extern "C" __global__`` function on one device.

    Args:
        function: the driver's handle.
        name: how errors call it.
    """

    def __init__(self, function: ctypes.c_void_p, name: str) -> None:
        self._function, self._name, self._shared = function, name, _SHARED_BYTES

    def launch(
        self, grid: tuple[int, ...], threads: int, arguments: Sequence[Any], shared: int = 0, after: bool = False
    ) -> None:
        """Start it on torch's current stream, on the current device.

        Args:
            grid: blocks in x, y and z.
            threads: per block.
            arguments: ctypes numbers or structures, in the order of the parameters; tensors go as their addresses.
            shared: bytes of dynamic shared memory.
            after: whether it waits by itself for what the launch before it wrote, and may start before that one ends
                (programmatic dependent launch; from compute capability 9.0 on).

        Raises:
            SlabError: the driver refused.
        """
        if shared > self._shared:
            _check(_driver().cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED_SIZE, shared), self._name)
            self._shared = shared
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        x, y, z = (*grid, 1, 1)[:3]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        early = after and torch.cuda.get_device_capability() >= (9, 0)
        config = _Config(x, y, z, threads, 1, 1, shared, stream, ctypes.pointer(attribute), int(early))
        status = _driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None)
        _check(status, self._name)


def kernel(source: str, name: str, device: torch.device) -> Kernel:
    """A function of a text, compiled when it is first asked for.

    Args:
        source: CUDA C++ without includes of files.
        name: of an ``extern "C"`` function in it.
        device: a CUDA device.

    Raises:
        SlabError: NVRTC is missing, or does not accept the text.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    return _kernel(source, name, index)


@cache
def _kernel(source: str, name: str, index: int) -> Kernel:
    function = ctypes.c_void_p()
    found = _driver().cuModuleGetFunction(ctypes.byref(function), _module(source, index), name.encode())
    _check(found, name)
    return Kernel(function, name)


@cache
def _module(source: str, index: int) -> ctypes.c_void_p:
    """Machine code of a text, loaded on one device."""
    major, minor = torch.cuda.get_device_capability(index)
    path = _cache() / f"{_key(source, major, minor)}.cubin"
    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()  # makes the context, which loading needs
        module = ctypes.c_void_p()
        with suppress(OSError):
            if _driver().cuModuleLoadData(ctypes.byref(module), path.read_bytes()) == 0:
                return module
        code = compiled(source, f"sm_{major}{minor}")
        _keep(code, path)
        _check(_driver().cuModuleLoadData(ctypes.byref(module), code), "the module")
    return module


def compiled(source: str, architecture: str) -> bytes:
    """Machine code for one architecture; needs no GPU.

    Args:
        source: CUDA C++ without includes of files.
        architecture: as ``sm_90``.

    Raises:
        SlabError: NVRTC is missing, or does not accept the text.
    """
    library = _nvrtc()
    if isinstance(library, str):
        raise SlabError(library)
    program = ctypes.c_void_p()
    made = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"slablm.cu", 0, None, None)
    if made:
        raise SlabError(f"NVRTC gave up with error {made}")
    options = [option.encode() for option in (*_OPTIONS, f"--gpu-architecture={architecture}")]
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    try:
        if status:
            log = _text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise SlabError(f"NVRTC does not accept a kernel for {architecture}: {_line(log)}")
        return _text(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    library = _nvrtc()
    return library if isinstance(library, str) else None


@cache
def _nvrtc() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    version = torch.version.cuda
    major = version.split(".")[0] if version else ""
    names = [f"libnvrtc.so.{major}"] if major else []
    for folder in map(Path, sys.path):  # torch's wheels bring it along beside torch
        names += sorted(map(str, folder.glob("nvidia/*/lib/libnvrtc.so.*")), reverse=True)
    for name in names:
        with suppress(OSError):
            if Path(name).is_absolute():  # NVRTC would look elsewhere for its other half
                for part in Path(name).parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(part))
            return ctypes.CDLL(name)
    return "NVRTC, which compiles the kernels, is not there (pip install nvidia-cuda-nvrtc)"


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _text(size_of: Any, content_of: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    content_of(program, buffer)
    return buffer.raw


def _line(log: bytes) -> str:
    return log.decode(errors="replace").rstrip("\0\n ")


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise SlabError(f"{what} cannot run on this GPU: {(text.value or b'error').decode()} (CUDA error {status})")


def _key(source: str, major: int, minor: int) -> str:
    parts = (source, *_OPTIONS, str(torch.version.cuda), f"{major}.{minor}")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cache() -> Path:
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slablm"


def _keep(code: bytes, path: Path) -> None:
    """Write as a whole or not at all; a folder that cannot be written to only costs time."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # goes away whatever happens
            draft = Path(folder) / path.name
            draft.write_bytes(code)
            draft.replace(path)
