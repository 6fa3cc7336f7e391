import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slablm.packing import PackedSpec
from slablm.runtime.kernels import native, reference, to_native
from tests.runtime.kernels.weights import error_bound, random_packed, specs

LIBRARY = native.load()
SETS = () if isinstance(LIBRARY, str) else LIBRARY.supported
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.skipif(not SETS, reason="no compiled kernels")


def relative_error(outputs, truth):
    """Of the vector of all outputs; a truth of zeros must be met exactly."""
    difference = torch.linalg.vector_norm(outputs.double() - truth)
    return (difference / torch.linalg.vector_norm(truth)).item() if truth.any() else difference.item()


def truth_of(weight, inputs):
    return inputs.double() @ reference.unpack(weight).double().T


@settings(max_examples=150)
@given(specs(), st.sampled_from([8, 16]), st.integers(1, native.MAX_TOKENS), st.integers(0, 2**31))
def test_every_instruction_set_equals_the_reference(spec, value_bits, tokens, seed):
    weight = to_native(random_packed(spec, seed), value_bits)
    inputs = torch.randn(tokens, spec.in_features, generator=torch.Generator().manual_seed(seed))
    truth = truth_of(weight, inputs)
    for name in SETS:
        difference = (native.matvec(LIBRARY, name, weight, inputs) - truth).abs()
        assert (difference <= error_bound(weight, inputs)).all(), name


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("value_bits", "bound"), [(16, 1e-5), (8, 1e-3)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("rank", "signs"), [(0, False), (1, True), (2, True)])
def test_relative_error_of_a_layer(name, value_bits, bound, tokens, rank, signs):
    weight = to_native(random_packed(PackedSpec(96, 777, 340, rank, signs, torch.float16), 1), value_bits)
    inputs = torch.randn(tokens, 777, generator=torch.Generator().manual_seed(2))
    assert relative_error(native.matvec(LIBRARY, name, weight, inputs), truth_of(weight, inputs)) <= bound


@given(specs(), st.sampled_from([8, 16]), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_unpacked_rows_are_the_reference_bit_for_bit(spec, value_bits, dtype, data):
    weight = to_native(random_packed(spec, data.draw(st.integers(0, 2**31))), value_bits)
    begin = data.draw(st.integers(0, spec.out_features))
    end = data.draw(st.integers(begin, spec.out_features))
    for name in SETS:
        output = torch.full((end - begin + 1, spec.in_features), -7.0, dtype=dtype)
        native.unpack(LIBRARY, name, weight, begin, end, output)
        assert torch.equal(output[:-1], reference.unpack(weight, begin, end).to(dtype)), name
        assert (output[-1] == -7).all(), "written behind the end"


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_inputs_and_outputs_of_every_type(name, dtype):
    weight = to_native(random_packed(PackedSpec(24, 200, 90, 1, True, torch.bfloat16), 3))
    inputs = torch.randn(2, 200, generator=torch.Generator().manual_seed(4)).to(dtype)
    outputs = native.matvec(LIBRARY, name, weight, inputs)
    assert outputs.dtype == dtype
    assert relative_error(outputs, truth_of(weight, inputs)) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_survive_the_way_through_16_bits(name, dtype):
    """The identity: subnormal, huge, infinite and missing numbers come out as they went in."""
    n = 64
    weight = to_native(random_packed(PackedSpec(n, n, 1, 0, False, torch.float16), 0))
    weight.planes[:, 0, 0] = torch.tensor([1 << i if i < 63 else -(1 << 63) for i in range(n)])
    weight.values[:n] = 1
    numbers = torch.tensor([0.0, -0.0, 1.0, -2.5, 6e-8, -3e-6, 6.1e-5, 1e-3, 65504.0, -65504.0, 3e38, 1e-38])
    inputs = torch.zeros(1, n)
    inputs[0, : len(numbers)] = numbers
    inputs = inputs.to(dtype).nan_to_num(posinf=torch.finfo(dtype).max)
    assert torch.equal(native.matvec(LIBRARY, name, weight, inputs), inputs)
    one = torch.zeros(1, n, dtype=dtype)
    one[0, 0] = float("inf")
    assert native.matvec(LIBRARY, name, weight, one)[0, 0] == float("inf")
    one[0, 0] = float("nan")
    assert native.matvec(LIBRARY, name, weight, one)[0, 0].isnan()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize(("rank", "signs"), [(0, False), (1, True), (2, True)])
def test_eight_bit_values_pass_nan_and_infinity_on(name, tokens, rank, signs):
    weight = to_native(random_packed(PackedSpec(9, 200, 90, rank, signs, torch.float16), 3), value_bits=8)
    for number, dtype in itertools.product((torch.nan, torch.inf, -torch.inf), FLOATS):
        inputs = torch.randn(tokens, 200, generator=torch.Generator().manual_seed(4)).to(dtype)
        inputs[0, 150] = number
        outputs, expected = native.matvec(LIBRARY, name, weight, inputs), reference.linear(inputs.float(), weight)
        assert not expected[0].isfinite().any()
        torch.testing.assert_close(outputs.float(), expected, rtol=2e-2, atol=5e-2, equal_nan=True)


@pytest.mark.parametrize("name", SETS)
def test_products_beyond_float32_are_infinite_as_in_the_reference(name):
    """v x is what becomes a fixed-point number, and 2 · 3e38 is none."""
    weight = to_native(random_packed(PackedSpec(4, 64, 10, 1, True, torch.float16), 0), value_bits=8)
    weight.right.fill_(2)
    outputs = native.matvec(LIBRARY, name, weight, torch.full((1, 64), 3e38))
    assert not outputs.isfinite().any()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("value_bits", [8, 16])
def test_threads_do_not_change_a_bit(name, value_bits):
    weight = to_native(random_packed(PackedSpec(515, 640, 300, 1, True, torch.float16), 5), value_bits)
    inputs = torch.randn(1, 640, generator=torch.Generator().manual_seed(6))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = native.matvec(LIBRARY, name, weight, inputs)
        torch.set_num_threads(3)
        assert torch.equal(native.matvec(LIBRARY, name, weight, inputs), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SETS)
def test_an_outlier_costs_the_rest_of_its_block_little(name):
    """One input of 1000 among inputs of size 1, as at an attention sink."""
    weight = to_native(random_packed(PackedSpec(64, 512, 200, 1, True, torch.float16), 7), value_bits=8)
    inputs = torch.randn(1, 512, generator=torch.Generator().manual_seed(8))
    inputs[0, 100] = 1000
    assert relative_error(native.matvec(LIBRARY, name, weight, inputs), truth_of(weight, inputs)) <= 1e-3


@pytest.mark.parametrize("value_bits", [8, 16])
def test_ranks_beyond_fixed_point(value_bits):
    weight = to_native(random_packed(PackedSpec(16, 90, 30, 11, True, torch.float16), 9), value_bits)
    inputs = torch.randn(1, 90, generator=torch.Generator().manual_seed(10))
    for name in SETS:
        assert relative_error(native.matvec(LIBRARY, name, weight, inputs), truth_of(weight, inputs)) <= 1e-5


def test_too_many_tokens_or_rows_are_refused():
    weight = to_native(random_packed(PackedSpec(2, 9, 3, 1, True, torch.float16), 0))
    with pytest.raises(RuntimeError, match="refused its arguments"):
        native.matvec(LIBRARY, "portable", weight, torch.zeros(native.MAX_TOKENS + 1, 9))
    with pytest.raises(RuntimeError, match="refused its arguments"):
        native.unpack(LIBRARY, "portable", weight, 1, 3, torch.zeros(2, 9))


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(9, 2).T,
        torch.zeros(2, 8),
        torch.zeros(2, 9, dtype=torch.float64),
        torch.zeros(2, 9, device="meta"),
    ],
)
def test_what_c_would_misread_is_refused(inputs):
    weight = to_native(random_packed(PackedSpec(2, 9, 3, 1, True, torch.float16), 0))
    with pytest.raises(RuntimeError, match="needs a contiguous"):
        native.matvec(LIBRARY, "portable", weight, inputs)
    with pytest.raises(RuntimeError, match="needs a contiguous"):
        native.unpack(LIBRARY, "portable", weight, 0, 2, inputs)


@pytest.mark.parametrize("output", [torch.zeros(9), torch.zeros(1, 9), torch.zeros(2, 1, 9)])
def test_what_c_would_overrun_is_refused(output):
    weight = to_native(random_packed(PackedSpec(2, 9, 3, 1, True, torch.float16), 0))
    with pytest.raises(RuntimeError, match="needs a contiguous matrix"):
        native.unpack(LIBRARY, "portable", weight, 0, 2, output)


def test_outputs_have_the_leading_dimensions_of_the_inputs():
    weight = to_native(random_packed(PackedSpec(2, 9, 3, 1, True, torch.float16), 0))
    for shape in ((), (3,), (2, 3), (1, 0)):
        assert native.matvec(LIBRARY, "portable", weight, torch.zeros(*shape, 9)).shape == (*shape, 2)
