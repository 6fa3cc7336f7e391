"""Loops in machine code for NVIDIA GPUs, by the disassembler that comes with Triton; Triton itself is not loaded."""

from __future__ import annotations

import re
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from slablm.runtime.kernels import gpu_symbols
from slablm.runtime.kernels.gpu_symbols import Shape
from slablm.system import cuda

WARP = 32
_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


def disassembler() -> Path | None:
    """Where it is, if Triton is installed."""
    triton = find_spec("triton")
    folders = [] if triton is None else triton.submodule_search_locations or []
    tools = (Path(folder) / "backends" / "nvidia" / "bin" / "nvdisasm" for folder in folders)
    return next(filter(Path.exists, tools), None)


def loops_of(machine_code: bytes) -> list[list[str]]:
    """Names of the instructions of every loop, one that holds others together with them."""
    tool = disassembler()
    assert tool is not None, "nvdisasm comes with triton"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    names: list[str] = []
    loops: list[list[str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        if found := _INSTRUCTION.match(line):
            names.append(found[1])
            jump = _TARGET.search(line)
            if found[1] == "BRA" and jump and jump[1] in labels:
                loops.append(names[labels[jump[1]] :])
    return loops


def main_loop(loops: list[list[str]], name: str) -> list[str]:
    """The shortest loop that has two thirds or more of the instructions `name` of any: what it stands in is longer."""
    most = max(loop.count(name) for loop in loops)
    return min((loop for loop in loops if 3 * loop.count(name) >= 2 * most), key=len)


def symbols_loop(bits: int, shape: Shape, architecture: str) -> tuple[list[str], float]:
    """The loop over tiles in the kernel for symbols, and the weights that a thread multiplies in one round of it.

    Args:
        bits: of a symbol.
        shape: what the kernel is compiled for.
        architecture: as ``sm_90``.
    """
    code = cuda.compiled(gpu_symbols.source(bits, torch.bfloat16, shape), architecture)
    loop = main_loop(loops_of(code), "IMMA")
    # Each of 16 rows, 32 columns and 4 tokens.
    products = loop.count("IMMA") / -(-shape.tokens // 4)
    return loop, 16 * 32 / WARP * products
