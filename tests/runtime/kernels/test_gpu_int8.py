"""The kernel for int8 rows on NVIDIA GPUs: its text as C++ on the CPU (`symbols_host.h`), machine code, who asks."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from slablm.packing.quantize import quantize_rows
from slablm.runtime import kernels
from slablm.runtime.kernels import dispatch, gpu_int8
from slablm.runtime.kernels.gpu_int8 import FEW_TOKENS, source
from slablm.system import cuda
from tests.runtime.kernels import symbols_host
from tests.runtime.kernels.test_symbols import FLOATS, inputs_of, relative_error

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import gpu_loops

needs_nvrtc = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))
needs_disassembler = pytest.mark.skipif(gpu_loops.disassembler() is None, reason="no nvdisasm, which triton brings")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

# Of a rounded input, and of an output that is no float32.
BOUND = {torch.float32: 1e-4, torch.float16: 6e-4, torch.bfloat16: 4e-3}
# Rows and columns: fewer than a warp has at a time, columns that fill no chunk, more chunks than warps.
SIZES = [(1, 16), (5, 48), (33, 512), (70, 528), (9, 1024), (3, 5120)]
PROCESSORS, ROOM = 2, 227 << 10


def rows_of(m, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return quantize_rows(torch.randn(m, n, generator=generator), "head")


def truth_of(inputs, weight, scales):
    return inputs.double() @ (weight.double() * scales.double()[:, None]).T


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture(params=[False, True])
def host(request, folder, monkeypatch):
    """The kernel runs on the CPU, threads in one of two orders; a list of its launches: blocks, threads."""
    libraries, launches = {}, []

    def library(text):
        if text not in libraries:
            name = folder / f"{hash(text)}{request.param}.so"
            libraries[text] = symbols_host.build(f'#include "{symbols_host.HEADER}"\n{text}LAUNCHER(int8_rows)\n', name)
        return libraries[text]

    class Kernel(symbols_host.HostKernel):
        def launch(self, grid, threads, *arguments, **more):
            launches.append((*grid, threads))
            super().launch(grid, threads, *arguments, **more)

    monkeypatch.setattr(symbols_host.HostKernel, "adverse", request.param)
    monkeypatch.setattr(cuda, "kernel", lambda text, name, device: Kernel(library(text), name))
    monkeypatch.setattr(gpu_int8, "_limits", lambda device: (PROCESSORS, ROOM))
    return launches


# ------------------------------------------------------------------------------------------- the kernel as C++ code


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
def test_a_few_tokens(host, dtype, tokens):
    for seed, (m, n) in enumerate(SIZES):
        weight, scales = rows_of(m, n, seed)
        inputs = inputs_of(tokens, n, dtype=dtype, seed=seed)
        outputs = gpu_int8.linear(inputs, weight, scales)
        assert outputs.dtype == dtype
        assert relative_error(outputs, truth_of(inputs, weight, scales)) <= BOUND[dtype], (m, n)


def test_blocks_go_on_to_further_rows(host):
    """More rows than all blocks have at a time; so few processors are enough to see it."""
    weight, scales = rows_of(2 * PROCESSORS * 8 * 32 + 5, 16)
    inputs = inputs_of(1, 16)
    assert relative_error(gpu_int8.linear(inputs, weight, scales), truth_of(inputs, weight, scales)) <= 1e-4
    assert host == [(PROCESSORS * 8, 256)]


@pytest.mark.parametrize(("tokens", "launches"), [(0, 0), (8, 1), (9, 2), (FEW_TOKENS, 4)])
def test_more_tokens_are_several_launches(host, tokens, launches):
    weight, scales = rows_of(6, 32)
    inputs = inputs_of(tokens, 32)
    outputs = gpu_int8.linear(inputs, weight, scales)
    assert outputs.shape == (tokens, 6)
    assert tokens == 0 or relative_error(outputs, truth_of(inputs, weight, scales)) <= 1e-4
    assert len(host) == launches


def test_wide_rows_leave_fewer_tokens_a_launch(host):
    """Inputs are in shared memory: 72 KiB are two tokens of 16384 columns."""
    weight, scales = rows_of(2, 16384)
    inputs = inputs_of(3, 16384)
    assert relative_error(gpu_int8.linear(inputs, weight, scales), truth_of(inputs, weight, scales)) <= 1e-4
    assert len(host) == 2


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_are_exact(host, sign):
    weight, scales = torch.full((2, 1024), sign * 127, dtype=torch.int8), torch.ones(2).half()
    outputs = gpu_int8.linear(torch.ones(1, 1024), weight, scales)
    torch.testing.assert_close(outputs, torch.full((1, 2), sign * 127 * 1024.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_token_that_is_not_finite_becomes_nan(host, bad):
    """And no other does."""
    weight, scales = rows_of(6, 96)
    inputs = inputs_of(3, 96)
    inputs[1, 77] = bad
    outputs = gpu_int8.linear(inputs, weight, scales)
    assert outputs.isnan().all(dim=1).tolist() == [False, True, False]
    assert relative_error(outputs[[0, 2]], truth_of(inputs[[0, 2]], weight, scales)) <= 1e-4


def test_zeros(host):
    weight, scales = rows_of(6, 1024)
    inputs = inputs_of(1, 1024)
    inputs[:, :512] = 0
    assert relative_error(gpu_int8.linear(inputs, weight, scales), truth_of(inputs, weight, scales)) <= 1e-4
    assert not gpu_int8.linear(torch.zeros(1, 1024), weight, scales).any()


# --------------------------------------------------------------------------------------------------------- machine code


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "sm_100"])
@pytest.mark.parametrize(("dtype", "tokens"), [(torch.bfloat16, 1), (torch.float16, 8), (torch.float32, 2)])
def test_every_architecture_has_code(architecture, dtype, tokens):
    assert b".text.int8_rows\0" in cuda.compiled(source(dtype, tokens), architecture)


@needs_nvrtc
@needs_disassembler
@pytest.mark.parametrize(("tokens", "most"), [(1, 1.3), (8, 7.5)])
def test_instructions_per_weight(tokens, most):
    loop = gpu_loops.main_loop(gpu_loops.loops_of(cuda.compiled(source(torch.bfloat16, tokens), "sm_90")), "IDP")
    weights = 4 * loop.count("IDP") / 2 / tokens
    assert 0.5 < len(loop) / weights <= most
    assert not {"LDL", "STL"} & set(loop)  # nothing is spilled


# ---------------------------------------------------------------------------------------------------------- who asks


def test_what_the_kernel_reads(monkeypatch):
    monkeypatch.setattr(gpu_int8, "_limits", lambda device: (PROCESSORS, ROOM))
    weight, scales = rows_of(4, 64)
    assert gpu_int8.reads(weight, scales)
    assert not gpu_int8.reads(rows_of(4, 72)[0], scales)  # no multiple of 16
    assert not gpu_int8.reads(torch.empty(64, 4, dtype=torch.int8).T, scales)
    assert not gpu_int8.reads(weight, torch.empty(8).half()[::2])
    assert not gpu_int8.reads(torch.empty(4 * 64 + 8, dtype=torch.int8)[8:].view(4, 64), scales)
    # More than there is of shared memory.
    assert not gpu_int8.reads(torch.empty(1, 1 << 17, dtype=torch.int8), torch.ones(1).half())


def on_gpu(device="cuda"):
    return SimpleNamespace(device=torch.device(device))


@pytest.mark.parametrize("name", ["cuda", "reference"])
def test_who_gets_it(name, monkeypatch):
    monkeypatch.setattr(dispatch, "symbols_backend", lambda device: SimpleNamespace(name=name))
    monkeypatch.setattr(gpu_int8, "reads", lambda weight, scales: True)
    inputs, scales = torch.ones(1, 16), torch.ones(4).half()
    assert dispatch._on_gpu(inputs, on_gpu(), scales) == (name == "cuda")
    assert not dispatch._on_gpu(inputs, on_gpu("cpu"), scales)
    assert not dispatch._on_gpu(inputs, on_gpu(), None)
    assert not dispatch._on_gpu(inputs.double(), on_gpu(), scales)


@needs_gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 5, FEW_TOKENS, FEW_TOKENS + 1])
def test_a_gpu_equals_the_reference(dtype, tokens):
    weight, scales = rows_of(3000, 1040)
    inputs = inputs_of(tokens, 1040, dtype=dtype)
    outputs = kernels.dense_linear(inputs.cuda(), weight.cuda(), scales.cuda()).cpu()
    assert relative_error(outputs, truth_of(inputs, weight, scales)) <= BOUND[dtype]


@needs_gpu
def test_a_graph_gives_the_same():
    weight, scales = (part.cuda() for part in rows_of(3000, 1024))
    inputs = inputs_of(1, 1024, dtype=torch.bfloat16).cuda()
    kernels.dense_linear(inputs, weight, scales)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = kernels.dense_linear(inputs, weight, scales)
    inputs.copy_(inputs_of(1, 1024, dtype=torch.bfloat16, seed=1))
    graph.replay()
    assert torch.equal(outputs, kernels.dense_linear(inputs, weight, scales))
