"""Kernels for weights in symbols: every instruction set gives what the dense weight gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from slablm.errors import SlabError
from slablm.methods.rotation import Rotation, largest_block
from slablm.runtime import kernels
from slablm.runtime.kernels import backends, dispatch, native, symbols
from tests.runtime.kernels.weights import FIXED_POINT_STEPS, random_symbols

LIBRARY = native.load()
SETS = () if isinstance(LIBRARY, str) else LIBRARY.supported
BACKENDS = (*SETS, "reference")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TILE = 128

needs_library = pytest.mark.skipif(not SETS, reason="no compiled kernels")


@st.composite
def weights(draw):
    n = draw(st.integers(1, 400) | st.sampled_from([64, 128, 192, 256, 320, 384]))
    block = draw(st.none() | st.sampled_from([2**k for k in range(largest_block(n).bit_length())]))
    rotation = None if block is None else Rotation(n, block, draw(st.integers(0, 2**64 - 1)))
    m, bits = draw(st.integers(1, 400) if draw(st.booleans()) else st.integers(1, 10)), draw(st.integers(2, 6))
    return random_symbols(m, n, bits, rotation, draw(st.integers(0, 2**31)))


def inputs_of(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotated(inputs, weight):
    return inputs.double() if weight.spec.rotation is None else weight.spec.rotation.rotate(inputs.double())


def truth_of(inputs, weight):
    return rotated(inputs, weight) @ weight.unpack().rotated_dense().double().T


def error_bound(inputs, weight):
    """Largest possible error of each output, [t, m]: float32 sums, and half a step for what is in fixed point."""
    dense = weight.unpack().rotated_dense().double().abs()
    return (2e-5 + 0.51 / FIXED_POINT_STEPS) * largest_of_tile(rotated(inputs, weight)) @ dense.T + 1e-12


def largest_of_tile(inputs):
    n = inputs.shape[1]
    tiles = functional.pad(inputs.abs(), (0, -n % TILE)).unflatten(1, (-1, TILE))
    return tiles.amax(dim=2, keepdim=True).expand_as(tiles).flatten(1)[:, :n]


def relative_error(outputs, truth):
    return (torch.linalg.vector_norm(outputs.double() - truth) / torch.linalg.vector_norm(truth)).item()


@pytest.fixture(params=BACKENDS)
def forced(request, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, request.param)
    return request.param


@needs_library
@settings(max_examples=80)
@given(weights(), st.integers(1, 20), st.sampled_from(FLOATS), st.integers(0, 2**31))
def test_every_instruction_set_equals_the_reference(weight, tokens, dtype, seed):
    inputs = inputs_of(tokens, weight.in_features, dtype=dtype, seed=seed)
    truth, bound = truth_of(inputs, weight), error_bound(inputs, weight)
    for name in SETS:
        run = symbols._decode if tokens <= dispatch.DECODE_TOKENS else symbols._prefill
        outputs = run(name, LIBRARY, weight, inputs)
        # bfloat16 prompts are rotated and multiplied as such; so is what comes out.
        rounding = {torch.float32: 0, torch.float16: 1e-3, torch.bfloat16: 2e-2}[dtype]
        size = rotated(inputs, weight).abs() @ weight.unpack().rotated_dense().double().abs().T
        assert outputs.dtype == dtype
        assert ((outputs - truth).abs() <= bound + rounding * size).all(), name


@needs_library
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_relative_error_of_a_layer(name, bits):
    weight = random_symbols(64, 1088, bits)
    for tokens, bound in ((1, 2e-4), (3, 2e-4), (4, 2e-4), (8, 1e-6)):
        inputs = inputs_of(tokens, 1088)
        outputs = native.symbols_matvec(LIBRARY, name, weight, inputs)
        assert relative_error(outputs, truth_of(inputs, weight)) <= bound


@needs_library
@pytest.mark.parametrize("name", SETS)
def test_an_outlier_costs_the_rest_of_its_tile_little(name):
    """One input of 1000 among inputs of size 1, as at an attention sink."""
    weight, inputs = random_symbols(64, 512, 4), inputs_of(1, 512)
    inputs[0, 100] = 1000
    outputs = native.symbols_matvec(LIBRARY, name, weight, inputs)
    assert relative_error(outputs, truth_of(inputs, weight)) <= 1e-3


@needs_library
@given(weights(), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
@settings(max_examples=60)
def test_unpacked_rows_are_the_reference_bit_for_bit(weight, dtype, data):
    m, n = weight.spec.out_features, weight.in_features
    begin = 4 * data.draw(st.integers(0, m // 4))
    end = data.draw(st.integers(begin, m))
    dense = weight.unpack().rotated_dense()[begin:end].to(dtype)
    for name in SETS:
        output = torch.full((end - begin + 1, n), -7.0, dtype=dtype)
        native.symbols_unpack(LIBRARY, name, weight, begin, end, output)
        assert torch.equal(output[:-1], dense), name
        assert (output[-1] == -7).all(), "written behind the end"


@needs_library
@given(st.integers(1, 6), st.integers(0, 9), st.integers(0, 2**64 - 1))
@settings(max_examples=40)
def test_inputs_are_rotated_and_rotated_back(count, logarithm, seed):
    for factor in (1, 3):
        rotation = Rotation(factor * 2**logarithm, 2**logarithm, seed)
        rows = inputs_of(count, rotation.size)
        for name in SETS:
            turned = rows.clone()
            native.rotate(LIBRARY, name, rotation, turned)
            torch.testing.assert_close(turned, rotation.rotate(rows), rtol=1e-5, atol=1e-5)
            native.rotate(LIBRARY, name, rotation, turned, restore=True)
            torch.testing.assert_close(turned, rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotation", [None, Rotation(192, 64, 2**63 + 5)])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("shape", [(192,), (1, 192), (2, 3, 192), (5, 5, 192), (0, 192), (2, 0, 192)])
def test_leading_dimensions_and_types(forced, rotation, dtype, shape):
    weight, inputs = random_symbols(21, 192, 3, rotation), inputs_of(*shape, dtype=dtype)
    outputs = kernels.symbols_linear(inputs, weight)
    assert outputs.shape == (*shape[:-1], 21)
    assert outputs.dtype == dtype
    expected = functional.linear(inputs.float(), weight.dense())
    torch.testing.assert_close(outputs, expected.to(dtype), rtol=2e-2, atol=0.1)


def test_inputs_with_gaps(forced):
    weight, inputs = random_symbols(9, 200, 5), inputs_of(200, 3).T
    assert not inputs.is_contiguous()
    truth = functional.linear(inputs, weight.dense())
    torch.testing.assert_close(kernels.symbols_linear(inputs, weight), truth, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("rotation", [None, Rotation(192, 64, 3)])
@pytest.mark.parametrize("tokens", [1, 4, 8, 20])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinity_and_nan_give_what_the_reference_gives(forced, rotation, tokens, value):
    weight, inputs = random_symbols(30, 192, 4, rotation), inputs_of(tokens, 192)
    weight.scales[0] = 0
    inputs[tokens // 2, 70] = value
    truth = functional.linear(inputs, weight.dense())
    outputs = kernels.symbols_linear(inputs, weight)
    assert torch.equal(outputs.isnan(), truth.isnan())
    assert torch.equal(outputs.isinf(), truth.isinf())
    torch.testing.assert_close(outputs, truth, rtol=1e-3, atol=2e-2, equal_nan=True)


def test_inputs_whose_rotation_overflows(forced):
    weight = random_symbols(8, 64, 4, Rotation(64, 64, 0))
    inputs = torch.full((1, 64), 3e38) * weight.spec.rotation.signs
    truth = functional.linear(inputs, weight.dense())
    torch.testing.assert_close(kernels.symbols_linear(inputs, weight), truth, equal_nan=True)


@needs_library
@pytest.mark.parametrize("name", SETS)
def test_nothing_but_zeros(name):
    weight = random_symbols(8, 200, 4)
    assert not native.symbols_matvec(LIBRARY, name, weight, torch.zeros(1, 200)).any()
    weight.scales.zero_()
    assert not native.symbols_matvec(LIBRARY, name, weight, inputs_of(1, 200)).any()


@needs_library
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("level", [-128, -1, 0, 127])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_the_largest_and_smallest_sums(name, level, tokens):
    """All inputs alike and as large as fixed point allows, times levels alike: sums that cancel, or nearly overflow."""
    weight = random_symbols(5, 320, 5)
    weight.levels.fill_(level)
    inputs = torch.tensor([1.0, -1.0, 1e35, -1e-20])[:tokens, None].expand(-1, 320).contiguous()
    for codes in (weight.symbols, weight.symbols & 0):
        weight.symbols.copy_(codes)
        outputs = native.symbols_matvec(LIBRARY, name, weight, inputs)
        truth, bound = truth_of(inputs, weight), 1e-6 * inputs.double().abs() @ weight.dense().double().abs().T
        assert ((outputs - truth).abs() <= bound).all()


@needs_library
@pytest.mark.parametrize("name", SETS)
def test_threads_do_not_change_a_bit(name):
    weight, inputs = random_symbols(515, 640, 3, Rotation(640, 128, 1)), inputs_of(1, 640)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = native.symbols_matvec(LIBRARY, name, weight, inputs)
        torch.set_num_threads(3)
        assert torch.equal(native.symbols_matvec(LIBRARY, name, weight, inputs), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rotation", [None, Rotation(192, 64, 2**64 - 1)])
@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
@pytest.mark.parametrize("shape", [(192,), (2, 3, 192), (20, 192), (0, 192)])
def test_gradients(forced, rotation, dtype, shape, monkeypatch):
    monkeypatch.setattr(symbols, "_TILE_BYTES", 192 * 4 * 8)  # 21 rows in tiles of 8
    weight, inputs = random_symbols(21, 192, 4, rotation), inputs_of(*shape, dtype=dtype).requires_grad_()
    outputs = kernels.symbols_linear(inputs, weight)
    factors = torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64).view(outputs.shape).to(dtype)
    (outputs * factors).sum().backward()
    dense = weight.dense().double()
    truth, size = factors.double() @ dense, factors.double().abs() @ dense.abs()
    bound = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert inputs.grad.dtype == dtype
    assert ((inputs.grad - truth).abs() <= bound * size + 1e-3 * bound).all()


@needs_library
def test_forward_and_backward_run_on_the_kernels(monkeypatch):
    weight = random_symbols(21, 192, 4, Rotation(192, 64, 5))
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(type(weight), "dense", None)
    for tokens in (1, 20):
        inputs = inputs_of(tokens, 192).requires_grad_()
        kernels.symbols_linear(inputs, weight).sum().backward()
        assert inputs.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 20])
def test_opcheck(tokens):
    weight = random_symbols(20, 192, 4, Rotation(192, 64, 2**63))
    arguments = symbols._arguments(weight)
    inputs = inputs_of(tokens, 192).requires_grad_()
    torch.library.opcheck(torch.ops.slablm.symbols_linear.default, (inputs, *arguments))
    torch.library.opcheck(torch.ops.slablm.symbols_linear_gradient.default, (inputs_of(tokens, 20), *arguments))
    assert symbols._weight(*arguments).spec == weight.spec


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(backend):
    weight, inputs = random_symbols(20, 192, 4, Rotation(192, 64, 2**63)), inputs_of(2, 3, 192)
    compiled = torch.compile(lambda x: kernels.symbols_linear(x, weight).relu(), fullgraph=True, backend=backend)
    assert torch.equal(compiled(inputs), kernels.symbols_linear(inputs, weight).relu())


def test_inputs_of_another_width_or_device_are_refused():
    weight = random_symbols(4, 64, 2)
    with pytest.raises(SlabError, match="do not fit a layer with 64 input features"):
        kernels.symbols_linear(torch.zeros(2, 63), weight)
    with pytest.raises(SlabError, match="the inputs are on meta"):
        kernels.symbols_linear(torch.zeros(2, 64, device="meta"), weight)


@needs_library
def test_what_c_would_misread_is_refused():
    weight = random_symbols(9, 64, 2)
    with pytest.raises(RuntimeError, match="refused its arguments"):
        native.symbols_matvec(LIBRARY, "portable", weight, torch.zeros(native.MAX_TOKENS + 1, 64))
    with pytest.raises(RuntimeError, match="refused its arguments"):
        native.symbols_unpack(LIBRARY, "portable", weight, 2, 8, torch.zeros(6, 64))
    with pytest.raises(RuntimeError, match="needs a contiguous"):
        native.symbols_matvec(LIBRARY, "portable", weight, torch.zeros(64, 2).T)
    weight.symbols.set_(weight.symbols.repeat(1, 2)[:, ::2])
    with pytest.raises(RuntimeError, match="contiguous symbols"):
        native.symbols_matvec(LIBRARY, "portable", weight, torch.zeros(1, 64))
