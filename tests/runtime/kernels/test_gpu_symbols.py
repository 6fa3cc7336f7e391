"""The kernels for symbols on NVIDIA GPUs: their text as C++ on the CPU, and on a GPU where there is one.

On the CPU a block's threads are fibers, and tensor cores and asynchronous copies are emulated (`symbols_host.h`).
Machine code, shapes and what Python decides are tested in test_gpu_symbols_code.py.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slablm.methods.rotation import Rotation
from slablm.methods.symbols import signs
from slablm.packing.tiles import pack_tiles
from slablm.runtime import kernels
from slablm.runtime.kernels import gpu_symbols
from slablm.runtime.kernels.gpu_symbols import FEW_TOKENS, Shape
from slablm.runtime.linear import SlabLinear
from tests.runtime.kernels import symbols_host
from tests.runtime.kernels.test_symbols import FLOATS, inputs_of, relative_error, truth_of
from tests.runtime.kernels.weights import random_symbols

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

HALF = torch.float16
# Symbol bits, type, and a shape: tokens, k_warps, depth, blocks.
VARIANTS = [
    (2, torch.float32, Shape(1, 2, 2, 1)),
    (2, HALF, Shape(8, 2, 2, 1)),
    (3, torch.float32, Shape(4, 2, 2, 1)),
    (3, torch.bfloat16, Shape(1, 3, 3, 1)),
    (4, torch.float32, Shape(2, 2, 2, 1)),
    (4, torch.bfloat16, Shape(16, 4, 3, 1)),
    (5, HALF, Shape(4, 2, 2, 1)),
    (5, torch.float32, Shape(8, 2, 4, 1)),
    (6, torch.bfloat16, Shape(4, 2, 2, 1)),
    (6, torch.float32, Shape(1, 2, 3, 1)),
]
# Rows, columns, and a block of the rotation: half tiles alone and behind whole ones, columns that fill none, more
# columns than one block of threads prepares.
SIZES = [
    (1, 1, None),
    (16, 64, 64),
    (20, 128, None),
    (33, 300, 4),
    (70, 448, 1),
    (7, 640, 128),
    (5, 1096, 8),
    (3, 2048, 2048),
]
# Of outputs in another type than float32.
ROUNDING = {torch.float32: 0, HALF: 5e-4, torch.bfloat16: 4e-3}


def name_of(variant):
    bits, dtype, shape = variant
    return f"{bits}-{str(dtype)[6:]}-{shape.tokens}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture(params=VARIANTS, ids=name_of)
def variant(request, folder, monkeypatch):
    """One kind of weight and a shape for it, which run on the CPU."""
    bits, dtype, shape = request.param
    library = symbols_host.library(folder, bits, dtype, shape)

    def kernel(name, inputs, weight=None, asked=shape):
        assert asked == shape
        assert inputs.dtype == dtype
        return symbols_host.HostKernel(library, name)

    monkeypatch.setattr(gpu_symbols, "_kernel", kernel)
    monkeypatch.setattr(gpu_symbols, "_shape", lambda weight, count: shape)
    return request.param


def weight_of(m, n, bits, block, seed=0):
    return random_symbols(m, n, bits, None if block is None else Rotation(n, block, seed), seed)


def bound_of(dtype):
    """Relative error that a product of a few tokens may have."""
    return 1e-4 + ROUNDING[dtype]


# ------------------------------------------------------------------------------------------------------------- decoding

DECODE = """
// Of one tile: [t][word][row][half][byte].
extern "C" void decode_tile(const u8* tile, const u32* levels, int W, u32 (*found)[2]) {
    const Table table = table_of(levels);
    for (int t = 0; t < 4; t++)
        for (int i = 0; i < W; i++, found += 4) {
            u32 low[4], top[4];
            for (int row = 0; row < 4; row++) {
                low[row] = ((const u32*)(tile + low_offset(W, row, t)))[i];
                top[row] = TOP_BITS ? ((const u32*)(tile + top_offset(W, row, t)))[i] : 0;
            }
            decode(found, table, low, top, t);
        }
}
extern "C" u32 bytes_of(int W) { return tile_bytes(W); }
"""


@pytest.fixture(scope="module")
def decoders(folder):
    text = (symbols_host.SOURCES / "symbols_decode.cuh").read_text(encoding="utf-8") + DECODE
    return {bits: symbols_host.build(text, folder / f"decode{bits}.so", f"-DBITS={bits}") for bits in range(2, 7)}


def decoded(decoder, tile, levels, words):
    """The bytes of one tile, [4 rows, 32 W columns] int8."""
    found = torch.empty(4, words, 4, 2, 4, dtype=torch.int8)
    decoder.decode_tile(symbols_host.address(tile), symbols_host.address(levels), words, symbols_host.address(found))
    # Bytes: columns c, c + w/2, c + 1, c + 1 + w/2, so the last axis is [pair, half of the tile].
    return found.unflatten(4, (2, 2)).permute(2, 5, 0, 1, 3, 4).reshape(4, 32 * words)


@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 1000))
def test_a_tile_is_decoded_to_its_levels(decoders, bits, halves, seed):
    """Levels, all their bits turned below an odd symbol, of every row, lane and word of whole tiles and half ones."""
    n, decoder = 64 * halves, decoders[bits]
    weight = random_symbols(4, n, bits, seed=seed).unpack()
    levels = weight.levels[weight.codes.long()]
    expected = torch.where(signs(weight.codes) < 0, ~levels, levels)
    tiles = pack_tiles(weight.codes, bits)[0]
    for start in range(0, n, 128):
        words = min(4, (n - start) // 32)
        tile = tiles[start // 128 * decoder.bytes_of(4) :][: decoder.bytes_of(words)].clone()
        assert torch.equal(decoded(decoder, tile, weight.levels, words), expected[:, start : start + 32 * words])


# ------------------------------------------------------------------------------------------- kernels as C++ on the CPU


@pytest.fixture(params=[False, True])
def adverse(request, monkeypatch):
    """The order in which threads take turns."""
    monkeypatch.setattr(symbols_host.HostKernel, "adverse", request.param)
    return request.param


def test_the_emulated_instructions_find_what_is_wrong(folder, adverse):
    """A copy that is not waited for, a barrier that is missing or that not all reach, and memory that is not there."""
    text = f"""#include "{symbols_host.HEADER}"
    extern "C" void hasty(const unsigned char* from, float* to) {{
        extern float thread_local columns[];
        fetch((unsigned char*)columns, from);
        *to = columns[0];
    }}
    extern "C" void unmet(float* to) {{
        extern float thread_local columns[];
        columns[threadIdx.x] = 1;
        to[threadIdx.x] = columns[blockDim.x - 1 - threadIdx.x];
    }}
    extern "C" void stuck(float*) {{ if (threadIdx.x) __syncthreads(); }}
    extern "C" void beyond(float*) {{
        extern float thread_local columns[];
        columns[8] = 1;
    }}
    """
    names = ("hasty", "unmet", "stuck", "beyond")
    text += "".join(f"LAUNCHER({name})\n" for name in names)
    library = symbols_host.build(text, folder / f"wrong{adverse}.so")
    hasty, unmet, stuck, beyond = (symbols_host.HostKernel(library, name) for name in names)
    given_numbers, numbers = torch.ones(4), torch.zeros(4)
    hasty.launch((1,), 1, (given_numbers, numbers), 16)
    assert numbers[0].isnan() != adverse  # late copies show it
    with pytest.raises(AssertionError, match="of no tensor"):
        hasty.launch((1,), 1, (given_numbers[:3], numbers), 16)
    unmet.launch((1,), 4, (numbers,), 16)
    assert numbers.isnan().any()
    with pytest.raises(AssertionError, match="wait for ever"):
        stuck.launch((1,), 4, (numbers,), 16)
    with pytest.raises(AssertionError, match="not asked for"):
        beyond.launch((1,), 1, (numbers,), 32)
    with pytest.raises(AssertionError, match="number of arguments"):
        beyond.launch((1,), 1, (numbers, numbers), 32)


def test_few_tokens_equal_the_dense_weight(variant, adverse):
    bits, dtype, shape = variant
    for seed, (m, n, block) in enumerate(SIZES):
        weight = weight_of(m, n, bits, block, seed)
        inputs = inputs_of(min(shape.tokens, (16, 3, 1)[seed % 3]), n, dtype=dtype, seed=seed)
        outputs = gpu_symbols.linear(inputs, weight)
        assert outputs.dtype == dtype
        assert relative_error(outputs, truth_of(inputs, weight)) <= bound_of(dtype), (m, n, block)


def test_unpacked_rows_are_the_dense_weight(variant):
    bits, dtype, _ = variant
    for seed, (m, n, block) in enumerate(SIZES):
        weight = weight_of(m, n, bits, block, seed)
        begin = m // 3
        expected = weight.unpack().rotated_dense()[begin:].to(dtype)
        assert torch.equal(gpu_symbols.unpack(weight, begin, m, dtype), expected)


def test_rotated_inputs(variant):
    dtype = variant[1]
    for n, block in [(1, 1), (64, 2), (300, 4), (96, 32), (1096, 8), (128, 128), (512, 256), (4096, 2048)]:
        rotation, inputs = Rotation(n, block, n), inputs_of(2, n, dtype=dtype)
        expected = rotation.rotate(inputs.float())
        found = gpu_symbols.rotate(inputs, rotation)
        assert relative_error(found, expected.double()) <= 1e-6 + ROUNDING[dtype]


def test_many_tokens_and_gradients(variant, monkeypatch):
    """Rows in several tiles."""
    bits, dtype, _ = variant
    weight = weight_of(21, 192, bits, 64)
    monkeypatch.setattr(gpu_symbols, "_TILE_BYTES", 6 * 192 * dtype.itemsize)
    inputs, gradient = inputs_of(FEW_TOKENS + 1, 192, dtype=dtype), inputs_of(3, 21, dtype=dtype)
    outputs = gpu_symbols.linear(inputs, weight)
    assert relative_error(outputs, truth_of(inputs, weight)) <= 1e-5 + 2 * ROUNDING[dtype]
    expected = gradient.double() @ weight.dense().double()
    assert relative_error(gpu_symbols.times(gradient, weight), expected) <= 1e-5 + 2 * ROUNDING[dtype]


@pytest.mark.parametrize("level", [-128, 127])
def test_the_largest_sums_are_exact(variant, level):
    """All bytes of a tile at their largest, above even symbols and above odd ones."""
    bits, dtype, shape = variant
    weight = weight_of(16, 256, bits, None)
    weight = replace(weight, levels=torch.full_like(weight.levels, level), scales=torch.ones_like(weight.scales))
    for parity in (0, 1):
        uniform = replace(weight, symbols=pack_tiles(torch.full((16, 256), parity, dtype=torch.uint8), bits))
        inputs = torch.ones(shape.tokens, 256, dtype=dtype)
        expected = torch.full((shape.tokens, 16), (1 - 2 * parity) * (2 * level + 1.0), dtype=dtype)
        outputs = gpu_symbols.linear(inputs, uniform)
        torch.testing.assert_close(outputs, expected, rtol=1e-6 + ROUNDING[dtype], atol=0)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_token_that_is_not_finite_becomes_nan(variant, bad):
    """And no other does."""
    bits, dtype, shape = variant
    weight = weight_of(20, 200, bits, 8)
    inputs = inputs_of(shape.tokens, 200, dtype=dtype)
    inputs[-1, 77] = bad
    outputs = gpu_symbols.linear(inputs, weight)
    assert outputs[-1].isnan().all()
    if shape.tokens > 1:
        assert relative_error(outputs[:-1], truth_of(inputs[:-1], weight)) <= bound_of(dtype)


def test_zeros(variant):
    """A tile without an input divides by nothing; a row of scale 0 is 0."""
    bits, dtype, _ = variant
    weight = weight_of(20, 300, bits, None)
    inputs = inputs_of(1, 300, dtype=dtype)
    inputs[:, :128] = 0
    outputs = gpu_symbols.linear(inputs, weight)
    assert relative_error(outputs, truth_of(inputs, weight)) <= bound_of(dtype)
    assert not outputs[:, weight.scales == 0].any()
    assert not gpu_symbols.linear(torch.zeros_like(inputs), weight).any()


def test_no_tokens(variant):
    bits, dtype, _ = variant
    assert gpu_symbols.linear(torch.empty(0, 64, dtype=dtype), weight_of(20, 64, bits, None)).shape == (0, 20)


# ------------------------------------------------------------------------------------------------------------ on a GPU


def on_gpu(weight):
    return replace(weight, **{name: part.cuda() for name, part in weight.parts().items()})


@st.composite
def gpu_weights(draw):
    n = draw(st.integers(1, 3000) | st.sampled_from([64, 128, 192, 1024, 2048, 4096]))
    block = draw(st.none() | st.sampled_from([2**k for k in range(13) if n % 2**k == 0]))
    return weight_of(draw(st.integers(1, 300)), n, draw(st.integers(2, 6)), block, draw(st.integers(0, 2**31)))


@needs_gpu
@settings(max_examples=100)
@given(gpu_weights(), st.integers(1, 50), st.sampled_from(FLOATS), st.integers(0, 2**31))
def test_a_gpu_equals_the_reference(weight, tokens, dtype, seed):
    inputs = inputs_of(tokens, weight.in_features, dtype=dtype, seed=seed)
    outputs = kernels.symbols_linear(inputs.cuda(), on_gpu(weight)).cpu()
    assert outputs.dtype == dtype
    # More tokens are multiplied in the inputs' type: inputs, weight and outputs are rounded, each at its place.
    bound = bound_of(dtype) if tokens <= FEW_TOKENS else 2e-3 + 3 * ROUNDING[dtype]
    assert relative_error(outputs, truth_of(inputs, weight)) <= bound


@needs_gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_gradient_on_a_gpu(dtype):
    weight = weight_of(70, 320, 4, 64)
    inputs = inputs_of(3, 320, dtype=dtype).cuda().requires_grad_()
    outputs = kernels.symbols_linear(inputs, on_gpu(weight))
    gradient = inputs_of(3, 70, dtype=dtype, seed=1)
    outputs.backward(gradient.cuda())
    expected = gradient.double() @ weight.dense().double()
    assert relative_error(inputs.grad.cpu(), expected) <= 2e-3 + 3 * ROUNDING[dtype]


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 16, 20, FEW_TOKENS + 1])
def test_a_graph_gives_the_same(tokens):
    """What is captured reads other inputs when it is run again; two layers, each of which may start early."""
    layer = nn.Sequential(*(SlabLinear.from_packed(weight_of(256, 256, 4, 64, k)) for k in range(2))).cuda()
    for part in layer:
        part.use_native()
    inputs = inputs_of(tokens, 256, dtype=torch.bfloat16).cuda()
    layer(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = layer(inputs)
    for seed in range(3):
        inputs.copy_(inputs_of(tokens, 256, dtype=torch.bfloat16, seed=seed))
        graph.replay()
        assert torch.equal(outputs, layer(inputs))


@needs_gpu
def test_a_token_that_is_not_finite_becomes_nan_on_a_gpu():
    weight, inputs = weight_of(70, 320, 4, 64), inputs_of(3, 320)
    inputs[1, 100] = torch.inf
    outputs = kernels.symbols_linear(inputs.cuda(), on_gpu(weight)).cpu()
    assert outputs.isnan().all(dim=1).tolist() == [False, True, False]
    assert outputs[[0, 2]].isfinite().all()
