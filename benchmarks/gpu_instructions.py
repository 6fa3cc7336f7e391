"""What a weight costs in GPU instructions: no GPU needed.

    python benchmarks/gpu_instructions.py

Compiles the Triton kernels for one architecture, disassembles them, and divides the instructions of the loop over the
columns by the weights that it handles. This is no time. But a multiprocessor starts four warp instructions per clock,
so at its best a GPU needs

    weights x instructions per weight / (32 lanes x 4 x multiprocessors x clock)

and where that is longer than reading the bytes takes, fewer instructions are what makes the kernel faster.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from slablm.runtime.kernels import triton_kernels

POINTERS = {"scales": "fp32", "planes": "i64", "offsets": "i16", "left": "fp32", "right": "fp32"}
WARP = 32
GROUP = 4  # columns per thread and step
SHOWN = 8


def compiled(kernel: Any, capability: int, inputs: str, values: str, warps: int, **constants: int) -> CompiledKernel:
    """A kernel as machine code, with signs.

    Args:
        kernel: of `triton_kernels`.
        capability: 90 for an H100.
        inputs: type of inputs and outputs, as Triton calls it (``bf16``).
        values: type of the values.
        warps: per program.
        constants: what the kernel is compiled for.
    """
    constants = {"SIGNS": True, "SCALED": values == "i8", **constants}
    pointers = {"inputs": inputs, "outputs": inputs, "values": values, **POINTERS}
    types = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name in pointers or name in {"n", "words"}  # as in Llama's layers
    }
    source = ASTSource(kernel, types, places, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, WARP), options={"num_warps": warps})


def loop_of(machine_code: bytes) -> list[str]:
    """Names of the instructions of the longest loop."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        text = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    names: list[str] = []
    longest: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        if found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", line):
            names.append(found[1])
            jump = re.search(r"`\((\.L_x_\d+)\)", line)
            if found[1] == "BRA" and jump and jump[1] in labels and len(names) - labels[jump[1]] > len(longest):
                longest = names[labels[jump[1]] :]
    return longest


def main() -> None:
    """One line per kernel and variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="80: A100, 90: H100")
    options = parser.parse_args()
    from slablm.runtime.kernels import gpu

    rows, warps = gpu._MATVEC_ROWS[0][1], gpu._MATVEC_WARPS
    variants = [(triton_kernels.matvec, tokens, rows, WARP * warps, {}) for tokens in (1, 2, 4, 8)]
    variants += [(triton_kernels.matmul, tokens, tokens, 32, {"WIDEN": False}) for tokens in (16, 64)]
    print(f"compute capability {options.capability}, triton {triton.__version__}, bfloat16 inputs, rank 1, signs")
    for kernel, tokens, rows, groups, more in variants:
        for values in ("bf16", "i8"):
            sizes = {"RANK": 1, "TOKENS": tokens, "ROWS": rows, "GROUPS": groups, **more}
            built = compiled(kernel, options.capability, "bf16", values, warps, **sizes)
            loop = loop_of(built.asm["cubin"])
            weights = rows * groups * GROUP / (WARP * warps)
            most = ", ".join(f"{name} {count / weights:.1f}" for name, count in Counter(loop).most_common(SHOWN))
            print(f"{kernel.__name__:<7}{tokens:>3} token(s), {values:<5}{len(loop) / weights:6.1f} per weight: {most}")


if __name__ == "__main__":
    sys.exit(main())
