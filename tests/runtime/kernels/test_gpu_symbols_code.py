"""The kernels for symbols on NVIDIA GPUs, without one: their machine code, and what Python decides about them."""

import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from slablm.methods.rotation import Rotation
from slablm.packing.symbols import SymbolSpec
from slablm.runtime import kernels
from slablm.runtime.kernels import backends, gpu_symbols
from slablm.runtime.kernels.gpu_symbols import FEW_TOKENS, Shape, source
from slablm.system import cuda

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import gpu_loops

needs_nvrtc = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))
needs_disassembler = pytest.mark.skipif(gpu_loops.disassembler() is None, reason="no nvdisasm, which triton brings")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What a block can have at most on compute capability 8.6 and 8.9, 8.0, and 9.0 and 10.0.
ROOMS = (99 << 10, 163 << 10, 227 << 10)


# For each weight, by bits of a symbol.
MOST_INSTRUCTIONS = {2: 1.6, 3: 2.2, 4: 2.5, 5: 4.1, 6: 6.8}


def weight_of(m=64, n=256, bits=4, block=None):
    spec = SymbolSpec(m, n, bits, None if block is None else Rotation(n, block, 0))
    return spec.from_parts(spec.empty("cpu"))


# --------------------------------------------------------------------------------------------------------- machine code


@needs_nvrtc
@pytest.mark.parametrize(
    ("architecture", "bits", "dtype", "shape"),
    [
        *((architecture, 4, torch.bfloat16, Shape(1)) for architecture in ("sm_80", "sm_89", "sm_90", "sm_100")),
        *((architecture, 5, torch.float16, Shape(4, 2, 2, 1)) for architecture in ("sm_80", "sm_90")),
        *((architecture, 3, torch.float32, Shape(2)) for architecture in ("sm_89", "sm_100")),
        *((architecture, 6, torch.bfloat16, Shape(16, 2, 2, 2)) for architecture in ("sm_80", "sm_100")),
    ],
)
def test_every_architecture_has_code(architecture, bits, dtype, shape):
    code = cuda.compiled(source(bits, dtype, shape), architecture)
    for name in ("rotate", "quantize", "matvec", "unpack"):
        assert f".text.{name}\0".encode() in code


@needs_nvrtc
@needs_disassembler
@pytest.mark.parametrize(("bits", "most"), MOST_INSTRUCTIONS.items())
def test_instructions_per_weight(bits, most):
    """One token: above it a GPU with the memory of an H100 waits for instructions, not for bytes."""
    loop, weights = gpu_loops.symbols_loop(bits, next(gpu_symbols.shapes(1 << 16, 1)), "sm_90")
    assert 1 < len(loop) / weights <= most
    # Of every four weights: tables that are looked into, the mask of odd symbols, of 5 and 6 bits choices of two.
    assert loop.count("PRMT") <= {2: 1, 3: 2, 4: 3, 5: 6, 6: 12}[bits] / 4 * weights * 1.1
    assert not {"LDL", "STL"} & set(loop)  # nothing is spilled


@needs_disassembler
@needs_nvrtc
def test_the_loop_that_is_meant():
    text = """
    extern "C" __global__ void loops(float* numbers, int n, int m) {
        float sum = 0;
    #pragma unroll 1
        for (int k = 0; k < n; k++) {
            sum = __sinf(sum);
    #pragma unroll 1
            for (int j = 0; j < m; j++) sum = sum * numbers[j] + numbers[j + 1];
        }
        numbers[0] = sum;
    }"""
    loops = gpu_loops.loops_of(cuda.compiled(text, "sm_90"))
    inner, outer = gpu_loops.main_loop(loops, "FFMA"), max(loops, key=len)
    assert inner.count("FFMA") == 1
    assert "MUFU" not in inner
    assert "MUFU" in outer
    assert gpu_loops.main_loop(loops, "MUFU") == outer


# --------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_a_shape_fits_into_every_device(room, bits, monkeypatch):
    monkeypatch.setattr(gpu_symbols, "_shared_room", lambda device: room)
    for m in (1024, 4096, 16384):
        weight = weight_of(m, 64, bits)
        for tokens in range(1, 17):
            shape = gpu_symbols._shape(weight, tokens)
            assert shape.tokens >= tokens
            assert shape.shared(bits) <= room
            assert 32 * shape.k_warps <= 1024
            assert shape.depth >= 2  # a stage is read while the next one is fetched


def test_shared_memory_of_rotations_fits_into_every_device():
    for block in (1, 64, 4096, gpu_symbols._LARGEST_PIECE):
        size = gpu_symbols._piece(Rotation(gpu_symbols._LARGEST_PIECE, block, 0))
        assert size % 128 == 0
        assert size % block == 0
        shared = gpu_symbols._shared(size)
        assert shared <= ROOMS[0]


# -------------------------------------------------------------------------------------------------------------- weights


def test_what_the_kernels_read(monkeypatch):
    monkeypatch.setattr(gpu_symbols, "_shared_room", lambda device: ROOMS[0])
    for block, read in [(1, True), (16384, True), (32768, False)]:
        assert gpu_symbols.reads(weight_of(4, 32768, block=block)) == read
    weight = weight_of()
    for name in ("symbols", "levels"):  # torch allocates where the kernels want them
        part = getattr(weight, name)
        moved = torch.empty(part.numel() + 8, dtype=part.dtype)[8:].view_as(part)
        assert not gpu_symbols.reads(replace(weight, **{name: moved}))
    monkeypatch.setattr(gpu_symbols, "_shared_room", lambda device: 48 << 10)  # no place for a block of 16384
    assert gpu_symbols.reads(weight_of(4, 8192, block=8192))
    assert not gpu_symbols.reads(weight_of(4, 16384, block=16384))


def test_every_constant_is_in_the_text():
    base = (4, torch.bfloat16, Shape())
    others = [(3, *base[1:]), (4, torch.float16, Shape()), (4, torch.float32, Shape())]
    for field in fields(Shape):
        others.append((*base[:2], replace(Shape(), **{field.name: getattr(Shape(), field.name) + 1})))
    assert len({source(*arguments) for arguments in (base, *others)}) == 1 + len(others)
    lines = [line.split() for line in source(*base).splitlines()]
    defined = {line[1] for line in lines if len(line) == 3 and line[0] == "#define"}
    assert {"BITS", "TYPE", *(field.name.upper() for field in fields(Shape))} <= defined


def test_tokens_are_taken_sixteen_at_a_time(monkeypatch):
    taken = []
    monkeypatch.setattr(gpu_symbols, "_few", lambda part, weight, output: taken.append((len(part), len(output))))
    monkeypatch.setattr(gpu_symbols, "_many", lambda inputs, weight: taken.append(len(inputs)))
    for tokens in (1, 16, 17, FEW_TOKENS, FEW_TOKENS + 1):
        gpu_symbols.linear(torch.zeros(tokens, 256), weight_of())
    assert taken == [(1, 1), (16, 16), (16, 16), (1, 1), (16, 16), (16, 16), FEW_TOKENS + 1]


def test_bits_of_signs():
    """One bit per column, 1 for minus, from the lowest on."""
    rotation = Rotation(96, 32, 5)
    words = gpu_symbols._minus(rotation, torch.device("cpu")).tolist()
    signs = [-1 if words[j // 32] >> j % 32 & 1 else 1 for j in range(96)]
    assert signs == rotation.signs.int().tolist()


# ------------------------------------------------------------------------------------------------------------- dispatch


@pytest.fixture
def gpu(monkeypatch):
    """A pretended H100; decisions are made anew, and forgotten afterwards."""
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    backends._symbols_gpu_backend.cache_clear()
    yield monkeypatch
    backends._symbols_gpu_backend.cache_clear()


def test_a_gpu_has_kernels(gpu):
    assert kernels.explain_symbols("cuda") == "cuda: compiled for a GPU"


def test_without_what_compiles_them_it_is_the_reference(gpu):
    gpu.setattr(cuda, "missing", lambda: "NVRTC is not there")
    assert kernels.explain_symbols("cuda") == "reference: NVRTC is not there: plain torch, no speed-up"


def test_without_a_gpu_it_is_the_reference(gpu):
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.explain_symbols("cuda") == "reference: torch sees no GPU"


@needs_nvrtc
def test_gpus_without_the_instructions_get_the_reference(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert kernels.explain_symbols("cuda") == (
        "reference: a GPU has compute capability 7.5, the kernels need 8.0: plain torch, no speed-up"
    )


def test_the_reference_can_be_forced(gpu):
    gpu.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert kernels.explain_symbols("cuda") == "reference: forced by SLABLM_KERNEL"


def test_other_devices_are_told_as_ever():
    assert kernels.explain_symbols("cpu") == kernels.explain("cpu")
    assert kernels.explain_symbols("meta") == "reference: no kernels for meta"
