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

from slablm.methods.alphabet import grid_steps, level_count, on_grid
from slablm.methods.rotation import Rotation
from slablm.packing.tiles import pack_tiles
from slablm.runtime import kernels
from slablm.runtime.kernels import gpu_symbols
from slablm.runtime.kernels.gpu_symbols import FEW_TOKENS, Shape
from slablm.runtime.linear import SlabLinear
from tests.runtime.kernels import symbols_host
from tests.runtime.kernels.test_symbols import FLOATS, inputs_of, random_symbols, relative_error, truth_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

HALF = torch.float16
# Symbol bits, group size, type, and a shape: tokens, k_warps, row_warps, fragments, depth, blocks, fine.
VARIANTS = [
    (2, 128, torch.float32, Shape(1, 2, 1, 1, 2, 1, False)),
    (2, 256, HALF, Shape(8, 2, 2, 2, 2, 1, True)),
    (3, 128, torch.float32, Shape(4, 2, 2, 1, 2, 1, False)),
    (3, 128, torch.bfloat16, Shape(1, 2, 1, 2, 3, 1, True)),
    (4, 128, torch.float32, Shape(8, 2, 1, 2, 2, 1, False)),
    (4, 384, torch.float32, Shape(2, 2, 2, 1, 2, 1, True)),
    (4, 128, torch.bfloat16, Shape(16, 4, 1, 2, 3, 1, False)),
    (5, 128, HALF, Shape(4, 2, 2, 2, 2, 1, False)),
    (5, 256, torch.float32, Shape(8, 2, 1, 1, 2, 1, True)),
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
    bits, group_size, dtype, shape = variant
    return f"{bits}-{group_size}-{str(dtype)[6:]}-{shape.tokens}-{'fine' if shape.fine else 'grid'}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture(params=VARIANTS, ids=name_of)
def variant(request, folder, monkeypatch):
    """One kind of weight and a shape for it, which run on the CPU."""
    bits, group_size, dtype, shape = request.param
    library = symbols_host.library(folder, bits, group_size, dtype, shape)

    def kernel(name, inputs, weight=None, asked=shape):
        assert asked == shape
        assert inputs.dtype == dtype
        return symbols_host.HostKernel(library, name)

    def shape_for(weight, count, fine):
        assert fine == shape.fine
        return shape

    monkeypatch.setattr(gpu_symbols, "_kernel", kernel)
    monkeypatch.setattr(gpu_symbols, "_shape", shape_for)
    return request.param


def weight_of(variant, m, n, block, seed=0):
    """A random weight as the variant reads it, and what `linear` is told of its levels."""
    bits, group_size, _, shape = variant
    weight = random_symbols(m, n, bits, group_size, None if block is None else Rotation(n, block, seed), seed)
    weight = weight if shape.fine else replace(weight, levels=on_grid(weight.levels.float()).half())
    return weight, None if shape.fine else grid_steps(weight.levels)


def bound_of(variant):
    """Relative error that a product may have."""
    return (3e-4 if variant[3].fine else 1e-3) + ROUNDING[variant[2]]


# ------------------------------------------------------------------------------------------------------------- decoding

DECODE = """
// Of one tile: [row][t][word][half][kind: P, N, background of P, of N][byte].
extern "C" void decode(const u8* tile, int W, u32* found) {
    const Table table = {{0x03020100, 0x07060504, 0x0B0A0908, 0x0F0E0D0C}};
    for (int row = 0; row < 4; row++)
        for (int t = 0; t < 4; t++)
            for (int i = 0; i < W; i++) {
                const u32 low = ((const u32*)(tile + low_offset(W, row, t)))[i];
                const u32 signs = SIGN_PLANE ? ((const u32*)(tile + sign_offset(W, row)))[i] : 0;
                Selectors plus = selectors(low, signs, t), minus = turned(low, signs, t);
                for (int half = 0; half < 2; half++) {
                    *found++ = look_up(table, plus), *found++ = look_up(table, minus);
                    *found++ = background(plus), *found++ = background(minus);
                    plus = upper(plus), minus = upper(minus);
                }
            }
}
extern "C" u32 bytes_of(int W) { return tile_bytes(W); }
"""


@pytest.fixture(scope="module")
def decoders(folder):
    text = (symbols_host.SOURCES / "symbols_decode.cuh").read_text(encoding="utf-8") + DECODE
    return {bits: symbols_host.build(text, folder / f"decode{bits}.so", f"-DBITS={bits}") for bits in range(2, 6)}


def decoded(decoder, tile, words):
    """P − N of indices and of backgrounds in one tile, [4 rows, 32 W columns]."""
    found = torch.empty(4, 4, words, 2, 4, 4, dtype=torch.uint8)
    decoder.decode(symbols_host.address(tile), words, symbols_host.address(found))
    plus, minus, plus_back, minus_back = found.int().unbind(dim=4)
    # Bytes: columns c, c + w/2, c + 1, c + 1 + w/2, so the last axis is [pair, half of the tile].
    parts = [part.unflatten(4, (2, 2)) for part in (plus - minus, plus_back - minus_back)]
    assert not (plus * minus).any()  # one of them is 0: no byte is counted twice
    return [part.permute(0, 5, 1, 2, 3, 4).reshape(4, 32 * words) for part in parts]


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 1000))
def test_a_tile_is_decoded_to_its_symbols(decoders, bits, halves, seed):
    """`P − N` is the signed index, and ±1 where that is 0, of every row, lane and word of whole tiles and half ones."""
    n, decoder = 64 * halves, decoders[bits]
    symbols = torch.randint(0, 2**bits, (4, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    indices, minus = (symbols % 2 ** (bits - 1)).int(), symbols >= 2 ** (bits - 1)
    signs = 1 - 2 * minus.int()
    tiles = pack_tiles(symbols, bits)[0]
    for start in range(0, n, 128):
        words = min(4, (n - start) // 32)
        tile = tiles[start // 128 * decoder.bytes_of(4) :][: decoder.bytes_of(words)].clone()
        columns = slice(start, start + 32 * words)
        found, background = decoded(decoder, tile, words)
        assert torch.equal(found, (signs * indices)[:, columns])
        assert torch.equal(background, (signs * (indices == 0))[:, columns])


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
        fetch<16>((unsigned char*)columns, from);
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
    unmet.launch((1,), 4, (numbers,), 16)
    assert numbers.isnan().any()
    with pytest.raises(AssertionError, match="wait for ever"):
        stuck.launch((1,), 4, (numbers,), 16)
    with pytest.raises(AssertionError, match="not asked for"):
        beyond.launch((1,), 1, (numbers,), 32)
    with pytest.raises(AssertionError, match="number of arguments"):
        beyond.launch((1,), 1, (numbers, numbers), 32)


def test_few_tokens_equal_the_dense_weight(variant, adverse):
    *_, dtype, shape = variant
    for seed, (m, n, block) in enumerate(SIZES):
        weight, steps = weight_of(variant, m, n, block, seed)
        inputs = inputs_of(min(shape.tokens, (16, 3, 1)[seed % 3]), n, dtype=dtype, seed=seed)
        outputs = gpu_symbols.linear(inputs, weight, steps)
        assert outputs.dtype == dtype
        assert relative_error(outputs, truth_of(inputs, weight)) <= bound_of(variant), (m, n, block)


def test_unpacked_rows_are_the_dense_weight(variant):
    for seed, (m, n, block) in enumerate(SIZES):
        weight, _ = weight_of(variant, m, n, block, seed)
        begin = m // 3
        expected = weight.unpack().rotated_dense()[begin:].to(variant[2])
        assert torch.equal(gpu_symbols.unpack(weight, begin, m, variant[2]), expected)


def test_rotated_inputs(variant):
    dtype = variant[2]
    for n, block in [(1, 1), (64, 2), (300, 4), (96, 32), (1096, 8), (128, 128), (512, 256), (4096, 2048)]:
        rotation, inputs = Rotation(n, block, n), inputs_of(2, n, dtype=dtype)
        expected = rotation.rotate(inputs.float())
        found = gpu_symbols.rotate(inputs, rotation)
        assert relative_error(found, expected.double()) <= 1e-6 + ROUNDING[dtype]


def test_many_tokens_and_gradients(variant, monkeypatch):
    """Rows in several tiles."""
    dtype = variant[2]
    weight, steps = weight_of(variant, 21, 192, 64)
    monkeypatch.setattr(gpu_symbols, "_TILE_BYTES", 8 * 192 * dtype.itemsize)
    inputs, gradient = inputs_of(FEW_TOKENS + 1, 192, dtype=dtype), inputs_of(3, 21, dtype=dtype)
    outputs = gpu_symbols.linear(inputs, weight, steps)
    assert relative_error(outputs, truth_of(inputs, weight)) <= 1e-5 + 2 * ROUNDING[dtype]
    expected = gradient.double() @ weight.dense().double()
    assert relative_error(gpu_symbols.times(gradient, weight), expected) <= 1e-5 + 2 * ROUNDING[dtype]


def test_the_largest_sums_are_exact(variant):
    """All bytes of a tile at their largest: what a sum is added to, MAGIC, has room for it."""
    bits, _, dtype, shape = variant
    m, n = 16, 256
    codes = torch.full((m, n), level_count(bits), dtype=torch.uint8)
    top = 2 ** (bits - 1)
    for sign in (0, top):
        weight, _ = weight_of(variant, m, n, None)
        weight = replace(
            weight,
            symbols=pack_tiles(codes | sign, bits),
            levels=torch.ones_like(weight.levels),
            scales=torch.ones_like(weight.scales),
        )
        inputs = torch.ones(shape.tokens, n, dtype=dtype)
        expected = torch.full((shape.tokens, m), -256.0 if sign else 256.0, dtype=dtype)
        outputs = gpu_symbols.linear(inputs, weight, None if shape.fine else 127)
        torch.testing.assert_close(outputs, expected, rtol=1e-6 + ROUNDING[dtype], atol=0)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_token_that_is_not_finite_becomes_nan(variant, bad):
    """And no other does."""
    *_, dtype, shape = variant
    weight, steps = weight_of(variant, 20, 200, 8)
    inputs = inputs_of(shape.tokens, 200, dtype=dtype)
    inputs[-1, 77] = bad
    outputs = gpu_symbols.linear(inputs, weight, steps)
    assert outputs[-1].isnan().all()
    if shape.tokens > 1:
        assert relative_error(outputs[:-1], truth_of(inputs[:-1], weight)) <= bound_of(variant)


def test_zeros(variant):
    """A tile without an input, and a weight of the background alone, divide by nothing."""
    *_, dtype, shape = variant
    weight, steps = weight_of(variant, 20, 300, None)
    inputs = inputs_of(1, 300, dtype=dtype)
    inputs[:, :128] = 0
    assert relative_error(gpu_symbols.linear(inputs, weight, steps), truth_of(inputs, weight)) <= bound_of(variant)
    assert not gpu_symbols.linear(torch.zeros_like(inputs), weight, steps).any()
    if shape.fine:  # such levels lie on no grid
        weight = replace(weight, levels=torch.zeros_like(weight.levels))
        assert relative_error(gpu_symbols.linear(inputs, weight, None), truth_of(inputs, weight)) <= bound_of(variant)


def test_no_tokens(variant):
    weight, steps = weight_of(variant, 20, 64, None)
    assert gpu_symbols.linear(torch.empty(0, 64, dtype=variant[2]), weight, steps).shape == (0, 20)


# ------------------------------------------------------------------------------------------------------------ on a GPU


def on_gpu(weight):
    return replace(weight, **{name: part.cuda() for name, part in weight.parts().items()})


def random_weight(m, n, bits, group_size, block, seed, fine):
    weight = random_symbols(m, n, bits, group_size, None if block is None else Rotation(n, block, seed), seed)
    weight = weight if fine else replace(weight, levels=on_grid(weight.levels.float()).half())
    return weight, None if fine else grid_steps(weight.levels)


@st.composite
def gpu_weights(draw):
    n = draw(st.integers(1, 3000) | st.sampled_from([64, 128, 192, 1024, 2048, 4096]))
    block = draw(st.none() | st.sampled_from([2**k for k in range(13) if n % 2**k == 0]))
    shape = draw(st.integers(32, 300)), n, draw(st.integers(2, 5)), draw(st.sampled_from([128, 256, 384]))
    return random_weight(*shape, block, draw(st.integers(0, 2**31)), draw(st.booleans()))


@needs_gpu
@settings(max_examples=100)
@given(gpu_weights(), st.integers(1, 50), st.sampled_from(FLOATS), st.integers(0, 2**31))
def test_a_gpu_equals_the_reference(drawn, tokens, dtype, seed):
    weight, steps = drawn
    inputs = inputs_of(tokens, weight.in_features, dtype=dtype, seed=seed)
    outputs = kernels.symbols_linear(inputs.cuda(), on_gpu(weight), steps).cpu()
    assert outputs.dtype == dtype
    # More tokens are multiplied in the inputs' type: inputs, weight and outputs are rounded, each at its place.
    bound = (1e-3 if steps else 3e-4) + ROUNDING[dtype] if tokens <= FEW_TOKENS else 2e-3 + 3 * ROUNDING[dtype]
    assert relative_error(outputs, truth_of(inputs, weight)) <= bound


@needs_gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_gradient_on_a_gpu(dtype):
    weight, steps = random_weight(70, 320, 4, 128, 64, 0, False)
    inputs = inputs_of(3, 320, dtype=dtype).cuda().requires_grad_()
    outputs = kernels.symbols_linear(inputs, on_gpu(weight), steps)
    gradient = inputs_of(3, 70, dtype=dtype, seed=1)
    outputs.backward(gradient.cuda())
    expected = gradient.double() @ weight.dense().double()
    assert relative_error(inputs.grad.cpu(), expected) <= 2e-3 + 3 * ROUNDING[dtype]


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 16, 20, FEW_TOKENS + 1])
def test_a_graph_gives_the_same(tokens):
    """What is captured reads other inputs when it is run again; two layers, each of which may start early."""
    layer = nn.Sequential(*(SlabLinear.from_packed(random_weight(256, 256, 4, 128, 64, k, False)[0]) for k in range(2)))
    layer = layer.cuda()
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
    weight, steps = random_weight(70, 320, 4, 128, 64, 0, False)
    inputs = inputs_of(3, 320)
    inputs[1, 100] = torch.inf
    outputs = kernels.symbols_linear(inputs.cuda(), on_gpu(weight), steps).cpu()
    assert outputs.isnan().all(dim=1).tolist() == [False, True, False]
    assert outputs[[0, 2]].isfinite().all()
