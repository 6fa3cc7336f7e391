"""Run by test_gpu.py in a process of its own, without the interpreter; needs no GPU.

Every kernel is compiled to machine code for an A100 and an H100, in the variants that differ, and the operator is
traced on tensors that only pretend to be on a GPU.
"""

import torch
import triton
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slablm.kernels import gpu, triton_kernels

# What the smallest GPUs with bfloat16 grant one program.
SHARED_BYTES = 99 << 10

POINTERS = {
    "scales": "fp32",
    "positions": "i32",
    "negatives": "i32",
    "offsets": "i16",
    "left": "fp32",
    "right": "fp32",
}


def signature(kernel, inputs, values, constants):
    """Type of every argument of a kernel, in Triton's words."""

    def kind(name):
        if name in constants:
            return "constexpr"
        pointer = {"inputs": inputs, "outputs": inputs, "values": values, **POINTERS}.get(name)
        return "i32" if pointer is None else f"*{pointer}"

    return {name: kind(name) for name in kernel.arg_names}


def compile_kernel(kernel, capability, inputs, values, warps, **constants):
    constants |= {"RANK": 2, "SIGNS": True, "SCALED": values == "i8"}
    types = signature(kernel, inputs, values, constants)
    indexed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, indexed)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert built.asm["cubin"]
    assert built.metadata.shared <= SHARED_BYTES, (kernel.__name__, built.metadata.shared)


def trace(tokens, dtype):
    m, n, words = 4096, 4096, 128
    with FakeTensorMode():
        planes = [torch.empty(m, words, dtype=torch.int32, device="cuda") for _ in range(2)]
        arguments = (
            torch.empty(tokens, n, dtype=dtype, device="cuda"),
            torch.empty(m * 1790 + 4, dtype=torch.int8, device="cuda"),
            torch.empty(m, device="cuda"),
            *planes,
            torch.empty(m, words, dtype=torch.int16, device="cuda"),
            torch.empty(m, 1, device="cuda"),
            torch.empty(1, n, device="cuda"),
        )
        graph = make_fx(gpu.run)(*arguments).graph
    outputs = next(node for node in graph.nodes if node.op == "output").args[0].meta["val"]
    assert (outputs.shape, outputs.dtype, outputs.device.type) == ((tokens, m), dtype, "cuda")
    return sum("triton_kernel_wrapper" in str(node.target) for node in graph.nodes)


def main():
    for values in ("bf16", "i8"):
        compile_kernel(triton_kernels.matvec, 90, "bf16", values, 4, TOKENS=8, ROWS=8, GROUPS=128)
    compile_kernel(triton_kernels.unpack, 90, "bf16", "i8", 4, ROWS=8, GROUPS=64)
    for capability in (80, 90):  # their tensor cores are programmed differently
        for inputs, groups in (("bf16", 32), ("fp32", 16)):
            sizes = {"TOKENS": 64, "ROWS": 64, "GROUPS": groups, "WIDEN": False}
            compile_kernel(triton_kernels.matmul, capability, inputs, "fp16", 4, **sizes)
    for tokens in (1, 20):
        assert trace(tokens, torch.bfloat16) == 1
    assert trace(500, torch.float32) == 2  # 64 MiB in tiles of 32


if __name__ == "__main__":
    main()
