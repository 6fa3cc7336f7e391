"""Dense weights, 16-bit and int8 rows: every instruction set and the tiled path against a product in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.runtime import kernels
from slablm.runtime.kernels import native

LIBRARY = native.load()
SETS = () if isinstance(LIBRARY, str) else LIBRARY.supported
NARROW = (torch.float16, torch.bfloat16)


def random(rows, columns, dtype, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def worst_error(outputs, inputs, weight):
    """In units of Σ |x w|: what rounding float32 sums can cost."""
    truth = inputs.double() @ weight.double().T
    scale = inputs.double().abs() @ weight.double().abs().T
    return ((outputs.double() - truth).abs() / scale.clamp_min(1e-30)).max().item()


@pytest.mark.skipif(not SETS, reason="no compiled kernels")
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, native.MAX_TOKENS),
    st.sampled_from(NARROW),
    st.integers(0, 2**31),
)
def test_every_instruction_set_equals_the_product(rows, columns, tokens, dtype, seed):
    weight, inputs = random(rows, columns, dtype, seed), random(tokens, columns, torch.float32, seed + 1)
    for name in SETS:
        assert worst_error(native.dense_matvec(LIBRARY, name, weight, inputs), inputs, weight) < 2e-6, name


def random_rows(rows, columns, seed):
    """Int8 numbers, all of them, and scales of very different sizes, one of them 0."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(torch.randn(rows, generator=generator) - 4).half()
    scales[0] = 0
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator), scales


def wide(weight, scales):
    return weight.double() * scales.double()[:, None]


@pytest.mark.skipif(not SETS, reason="no compiled kernels")
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, native.MAX_TOKENS),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_every_instruction_set_multiplies_int8_rows(rows, columns, tokens, dtype, seed):
    (weight, scales), inputs = random_rows(rows, columns, seed), random(tokens, columns, dtype, seed + 1)
    bound = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for name in SETS:
        outputs = native.dense_matvec(LIBRARY, name, weight, inputs, scales)
        assert outputs.dtype == dtype
        assert worst_error(outputs, inputs, wide(weight, scales)) < bound, name


@pytest.mark.skipif(not SETS, reason="no compiled kernels")
def test_what_is_no_pair_of_rows_and_scales_is_no_call():
    (weight, scales), inputs = random_rows(5, 30, 0), random(1, 30, torch.float32, 1)
    for dense, given_scales in ((weight, None), (weight.half(), scales), (weight, scales[:4]), (weight, scales[::2])):
        with pytest.raises(RuntimeError, match="this is a bug in slablm"):
            native.dense_matvec(LIBRARY, SETS[-1], dense, inputs, given_scales)


@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)],
)
def test_int8_rows_dispatched(tokens, dtype, bound, monkeypatch):
    monkeypatch.setattr(kernels.dispatch, "_TILE_BYTES", 4096)
    (weight, scales), inputs = random_rows(23, 130, 0), random(2 * tokens, 130, dtype, 1).view(2, tokens, 130)
    outputs = kernels.dense_linear(inputs, weight, scales)
    assert outputs.shape == (2, tokens, 23)
    assert outputs.dtype == dtype
    assert worst_error(outputs.view(-1, 23), inputs.view(-1, 130), wide(weight, scales)) < bound


@pytest.mark.parametrize("tokens", [1, 20])
def test_sums_of_int8_numbers_do_not_overflow_in_float16(tokens):
    """127 · 1 · 1000 is beyond it, and so is no output."""
    weight, scales = torch.full((3, 1000), 127, dtype=torch.int8), torch.tensor([1e-3, 0.1, 1.0]).half()
    outputs = kernels.dense_linear(torch.ones(tokens, 1000, dtype=torch.float16), weight, scales)
    assert torch.allclose(outputs[:, :2].float(), 127_000 * scales[:2].float(), rtol=1e-3)
    assert torch.isinf(outputs[:, 2]).all()


@pytest.mark.parametrize("tokens", [1, 20])
def test_int8_rows_with_gaps(tokens):
    (weight, scales), inputs = random_rows(40, 130, 0), random(tokens, 65, torch.float32, 1)
    weight, scales = weight[::2, ::2], scales[::2]
    assert worst_error(kernels.dense_linear(inputs, weight, scales), inputs, wide(weight, scales)) < 2e-6


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradients_flow_through_int8_rows(tokens, dtype, bound):
    (weight, scales), inputs = random_rows(9, 30, 0), random(tokens, 30, dtype, 1).requires_grad_()
    kernels.dense_linear(inputs, weight, scales).sum().backward()
    expected = wide(weight, scales).sum(0).expand(tokens, -1)
    assert (inputs.grad.double() - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize("tokens", [1, 20])
def test_opcheck_of_int8_rows(tokens):
    rows, inputs = random_rows(9, 30, 0), random(tokens, 30, torch.float32, 1)
    torch.library.opcheck(torch.ops.slablm.dense_linear.default, (inputs.requires_grad_(), *rows))
    torch.library.opcheck(torch.ops.slablm.dense_linear_gradient.default, (torch.randn(tokens, 9), *rows))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_int8_rows_compile_without_graph_breaks(backend):
    rows, inputs = random_rows(9, 30, 0), random(2, 30, torch.float32, 1)
    compiled = torch.compile(lambda x: kernels.dense_linear(x, *rows).relu(), fullgraph=True, backend=backend)
    assert torch.equal(compiled(inputs), kernels.dense_linear(inputs, *rows).relu())


@pytest.mark.skipif(not SETS, reason="no compiled kernels")
@pytest.mark.parametrize("name", SETS)
def test_nothing_behind_the_last_row_counts(name):
    whole = random(5, 37, torch.float16, 0)
    whole[4] = torch.nan
    inputs = random(3, 37, torch.float32, 1)
    assert torch.isfinite(native.dense_matvec(LIBRARY, name, whole[:4], inputs)).all()


@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
@pytest.mark.parametrize("weight_dtype", NARROW)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_dispatched(tokens, weight_dtype, dtype, bound):
    weight, inputs = random(23, 130, weight_dtype, 0), random(2 * tokens, 130, dtype, 1).view(2, tokens, 130)
    outputs = kernels.dense_linear(inputs, weight)
    assert outputs.shape == (2, tokens, 23)
    assert outputs.dtype == dtype
    assert worst_error(outputs.view(-1, 23), inputs.view(-1, 130), weight) < bound


def test_tiles_are_put_together(monkeypatch):
    monkeypatch.setattr(kernels.dispatch, "_TILE_BYTES", 4096)
    weight, inputs = random(50, 130, torch.float16, 0), random(20, 130, torch.float32, 1)
    assert worst_error(kernels.dense_linear(inputs, weight), inputs, weight) < 2e-6


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("gaps", ["transposed", "columns", "rows", "expanded"])
def test_weights_with_gaps(tokens, gaps):
    whole = random(130, 130, torch.float16, 0)
    weight = {"transposed": whole.T, "columns": whole[:, ::2], "rows": whole[::3], "expanded": whole[:1].expand(7, -1)}[
        gaps
    ]
    inputs = random(tokens, weight.shape[1], torch.float32, 1)
    assert not weight.is_contiguous()
    assert worst_error(kernels.dense_linear(inputs, weight), inputs, weight) < 2e-6


def test_a_weight_that_is_trained_gets_its_gradient():
    weight, inputs = random(9, 30, torch.float16, 0).requires_grad_(), random(2, 30, torch.float32, 1)
    kernels.dense_linear(inputs, weight).sum().backward()
    assert torch.allclose(weight.grad.float(), inputs.sum(0).expand(9, -1), atol=1e-2)


def test_gradients_flow_to_the_inputs():
    weight, inputs = random(9, 30, torch.float16, 0), random(2, 30, torch.float32, 1).requires_grad_()
    kernels.dense_linear(inputs, weight).sum().backward()
    assert torch.allclose(inputs.grad, weight.float().sum(0).expand(2, -1), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 20])
def test_opcheck(tokens):
    arguments = (random(tokens, 30, torch.float32, 1), random(9, 30, torch.float16, 0))
    torch.library.opcheck(torch.ops.slablm.dense_linear.default, arguments)


def test_compiles_without_graph_breaks():
    weight, inputs = random(9, 30, torch.float16, 0), random(2, 30, torch.float32, 1)
    compiled = torch.compile(lambda x: kernels.dense_linear(x, weight).relu(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(inputs), kernels.dense_linear(inputs, weight).relu())
