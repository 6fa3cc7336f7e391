"""The CUDA text on a CPU: the kernels of `gpu_symbols` compiled as C++, launched with the very arguments of a GPU."""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from slablm.runtime.kernels import gpu_symbols

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
NAMES = ("rotate", "quantize", "matvec", "unpack")
HEADER = Path(__file__).with_name("symbols_host.h")
SOURCES = Path(gpu_symbols.__file__).parent
FLAGS = ("-std=c++17", "-O1", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-shared", "-fPIC")
PROBLEMS = (
    "",
    "another number of arguments",
    "threads wait for ever",
    "shared memory that was not asked for",
    "memory of no tensor",
)


class HostKernel:
    """As `slablm.system.cuda.Kernel`."""

    # Which of two orders threads take turns in, of all kernels.
    adverse = False

    def __init__(self, library, name):
        self.function, self.lend = getattr(library, f"launch_{name}"), library.lend

    def launch(self, grid, threads, arguments, shared=0, after=False):
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        ends = [end for a in tensors for end in (a.data_ptr(), a.data_ptr() + a.nbytes)]
        self.lend((ctypes.c_void_p * len(ends))(*ends), len(tensors))
        found = self.function(pointers, len(values), *(*grid, 1)[:2], threads, shared, int(HostKernel.adverse))
        assert not found, PROBLEMS[found]


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def build(text, target, *flags):
    """A shared library of a C++ text."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    subprocess.run([COMPILER, *FLAGS, *flags, "-x", "c++", "-", "-o", target], input=text, text=True, check=True)
    return ctypes.CDLL(str(target))


@cache
def library(folder, bits, dtype, shape):
    """All kernels for one kind of weight."""
    launchers = "".join(f"LAUNCHER({name})\n" for name in NAMES)
    text = f'#include "{HEADER}"\n{gpu_symbols.source(bits, dtype, shape)}{launchers}'
    return build(text, folder / f"{bits}-{dtype}-{'-'.join(map(str, vars(shape).values()))}.so")
