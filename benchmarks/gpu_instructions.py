"""What a weight costs in GPU instructions: no GPU needed.

    python benchmarks/gpu_instructions.py

Compiles the Triton kernels and those for symbols for one architecture, disassembles them, and divides the instructions
of the loop over the columns by the weights that it handles. This is no time. But a multiprocessor starts four warp
instructions per clock, so at its best a GPU needs

    weights x instructions per weight / (32 lanes x 4 x multiprocessors x clock)

and where that is longer than reading the bytes takes, fewer instructions are what makes the kernel faster.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from gpu_loops import WARP, loops_of, symbols_loop
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from slablm.runtime.kernels import gpu_symbols, triton_kernels

POINTERS = {"scales": "fp32", "planes": "i64", "offsets": "i16", "left": "fp32", "right": "fp32"}
GROUP = 4  # columns per thread and step
SHOWN = 8
CLASSES = {
    "look-up": {"PRMT"},
    "tensor cores": {"IMMA"},
    "shared memory": {"LDS", "LDGSTS", "LDGDEPBAR", "DEPBAR", "STS"},
    "float": {"FADD", "FMUL", "FFMA", "HADD2", "I2FP"},
    "integer, moves": {"IMAD", "IADD3", "SHF", "LOP3", "MOV", "VIADD", "LEA", "SEL", "ISETP", "UIADD3", "ULEA", "UMOV"},
    "spilled": {"LDL", "STL"},
}


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


def print_triton(capability: int) -> None:
    """One line per Triton kernel and variant."""
    from slablm.runtime.kernels import gpu

    rows, warps = gpu._MATVEC_ROWS[0][1], gpu._MATVEC_WARPS
    kernel, groups = triton_kernels.matvec, WARP * warps
    print(f"compute capability {capability}, triton {triton.__version__}, bfloat16 inputs, rank 1, signs")
    for tokens in (1, 2, 4, 8):
        for values in ("bf16", "i8"):
            sizes = {"RANK": 1, "TOKENS": tokens, "ROWS": rows, "GROUPS": groups}
            built = compiled(kernel, capability, "bf16", values, warps, **sizes)
            loop = max(loops_of(built.asm["cubin"]), key=len)
            weights = rows * groups * GROUP / (WARP * warps)
            most = ", ".join(f"{name} {count / weights:.1f}" for name, count in Counter(loop).most_common(SHOWN))
            print(f"{kernel.__name__:<7}{tokens:>3} token(s), {values:<5}{len(loop) / weights:6.1f} per weight: {most}")


def class_of(name: str) -> str:
    """What an instruction is for."""
    return next((kind for kind, names in CLASSES.items() if name in names), "other")


def print_symbols(capability: int) -> None:
    """One line per kind of symbol and number of tokens: the shape for weights with many rows."""
    print("symbols")
    for bits in (2, 3, 4, 5, 6):
        for tokens in (1, 4, 8, 16):
            loop, weights = symbols_loop(bits, next(gpu_symbols.shapes(1 << 16, tokens)), f"sm_{capability}")
            counts = Counter(map(class_of, loop))
            listed = ", ".join(f"{kind} {counts[kind] / weights:.2f}" for kind in (*CLASSES, "other"))
            print(f"{bits} bits{tokens:>3} token(s){len(loop) / weights:6.2f} per weight: {listed}")


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="80: A100, 90: H100")
    options = parser.parse_args()
    print_triton(options.capability)
    print_symbols(options.capability)


if __name__ == "__main__":
    sys.exit(main())
