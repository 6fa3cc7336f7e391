"""Run by test_gpu.py in a process of its own, without the interpreter; needs no GPU.

Every kernel is compiled to machine code for an A100 and an H100, in the variants that differ, and the operator is
traced on tensors that only pretend to be on a GPU.
"""

import sys
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from gpu_instructions import compiled

from slablm.runtime.kernels import gpu, triton_kernels

# What the smallest GPUs with bfloat16 grant one program.
SHARED_BYTES = 99 << 10


def check_compiled(kernel, capability, inputs, values, **sizes):
    built = compiled(kernel, capability, inputs, values, warps=4, RANK=2, **sizes)
    assert built.asm["cubin"]
    assert built.metadata.shared <= SHARED_BYTES, (kernel.__name__, built.metadata.shared)


def trace(tokens, dtype, run=gpu.run):
    """Number of kernel launches that a compiler would see; m = n, so gradients have the inputs' shape."""
    m, n, words = 4096, 4096, 128
    with FakeTensorMode():
        arguments = (
            torch.empty(tokens, n, dtype=dtype, device="cuda"),
            torch.empty(m * 1790 + 4, dtype=torch.int8, device="cuda"),
            torch.empty(m, device="cuda"),
            torch.empty(m, words, 2, dtype=torch.int32, device="cuda"),
            torch.empty(m, words, dtype=torch.int16, device="cuda"),
            torch.empty(m, 1, device="cuda"),
            torch.empty(1, n, device="cuda"),
        )
        graph = make_fx(run)(*arguments).graph
    outputs = next(node for node in graph.nodes if node.op == "output").args[0].meta["val"]
    assert (outputs.shape, outputs.dtype, outputs.device.type) == ((tokens, m), dtype, "cuda")
    return sum("triton_kernel_wrapper" in str(node.target) for node in graph.nodes)


def main():
    for values in ("bf16", "i8"):
        check_compiled(triton_kernels.matvec, 90, "bf16", values, TOKENS=8, ROWS=8, GROUPS=128)
    check_compiled(triton_kernels.unpack, 90, "bf16", "i8", ROWS=8, GROUPS=64)
    for tokens in (1, 20):
        assert trace(tokens, torch.bfloat16) == 1
    gpu._TILE_BYTES = 32 << 20
    assert trace(500, torch.float32) == 2  # 64 MiB in two tiles

    def backward(*arguments):
        return gpu.run_gradient(*arguments, 4096)

    assert trace(20, torch.bfloat16, backward) == 1


if __name__ == "__main__":
    main()
