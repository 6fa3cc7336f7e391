"""Gradients with respect to the inputs: the kernels' are those of Ŵ, and no dense weight waits for the backward."""

import pytest
import torch
from torch import nn

from slablm.packing import PackedSpec
from slablm.runtime import kernels
from slablm.runtime.kernels import backends, dispatch, native, reference, to_gpu, to_native
from slablm.runtime.linear import SlabLinear
from tests.runtime.kernels.weights import random_packed

LIBRARY = native.load()
BACKENDS = (*(() if isinstance(LIBRARY, str) else LIBRARY.supported), "reference")
PACKED = random_packed(PackedSpec(20, 130, 50, 2, True, torch.float16), 0)
DENSE = torch.randn(20, 130, generator=torch.Generator().manual_seed(1)).half()
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=BACKENDS)
def forced(request, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, request.param)


def inputs_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def gradient_of(function, inputs):
    """Of a sum with weights of its own for every output."""
    outputs = function(inputs)
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64).view(outputs.shape).to(outputs.dtype)
    (outputs * weights).sum().backward()
    return inputs.grad, weights


def assert_gradient(function, inputs, dense):
    gradient, weights = gradient_of(function, inputs)
    truth, size = weights.double() @ dense.double(), weights.double().abs() @ dense.double().abs()
    assert gradient.dtype == inputs.dtype
    assert gradient.shape == inputs.shape
    assert ((gradient - truth).abs() <= BOUNDS[inputs.dtype] * size).all()


@pytest.mark.parametrize("value_bits", [8, 16])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(130,), (2, 3, 130), (20, 130), (0, 130)])
def test_of_a_compressed_weight(forced, value_bits, dtype, shape):
    weight = to_native(PACKED, value_bits)
    assert_gradient(lambda x: kernels.linear(x, weight), inputs_of(*shape, dtype=dtype), reference.unpack(weight))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(130,), (2, 3, 130), (20, 130), (0, 130)])
def test_of_a_dense_weight(forced, dtype, shape):
    assert_gradient(lambda x: kernels.dense_linear(x, DENSE), inputs_of(*shape, dtype=dtype), DENSE)


def test_in_several_tiles(monkeypatch):
    monkeypatch.setattr(dispatch, "_TILE_BYTES", 130 * 4 * 7)  # 20 rows in tiles of 7
    weight = to_native(PACKED)
    for shape in ((3, 130), (50, 130)):
        assert_gradient(lambda x: kernels.linear(x, weight), inputs_of(*shape), reference.unpack(weight))
        assert_gradient(lambda x: kernels.dense_linear(x, DENSE), inputs_of(*shape), DENSE)


@pytest.mark.skipif(isinstance(LIBRARY, str), reason="no compiled kernels")
def test_forward_and_backward_run_on_the_kernels(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(reference, "linear", None)
    monkeypatch.setattr(reference, "unpack", None)
    weight = to_native(PACKED)
    for tokens in (1, 40):
        assert gradient_of(lambda x: kernels.linear(x, weight), inputs_of(tokens, 130))[0].isfinite().all()


def test_nothing_dense_is_kept_for_the_backward():
    layer = SlabLinear.from_packed(PACKED)
    layer.use_native()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        layer(inputs_of(2, 130)).sum()
    assert sizes
    assert max(sizes) < 20 * 130


def test_the_weight_has_none_and_without_need_nothing_is_recorded():
    weight = to_native(PACKED)
    with torch.no_grad():
        assert not kernels.linear(inputs_of(2, 130), weight).requires_grad
    assert not kernels.linear(inputs_of(2, 130).detach(), weight).requires_grad
    outputs = kernels.linear(inputs_of(2, 130), weight)
    outputs.sum().backward()
    assert all(tensor.grad is None for tensor in weight.tensors)


@pytest.mark.parametrize("value_bits", [8, 16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_opcheck(value_bits, tokens):
    weight = to_native(PACKED, value_bits)
    torch.library.opcheck(torch.ops.slablm.linear.default, (inputs_of(tokens, 130), *weight.arguments, 130))
    torch.library.opcheck(torch.ops.slablm.dense_linear.default, (inputs_of(tokens, 130), DENSE))
    gradient = torch.randn(tokens, 20)
    torch.library.opcheck(torch.ops.slablm.linear_gradient.default, (gradient, *weight.arguments, 130))
    torch.library.opcheck(torch.ops.slablm.dense_linear_gradient.default, (gradient, DENSE))


@pytest.mark.parametrize("tokens", [1, 40])
def test_compiled(tokens):
    layer = nn.Sequential(SlabLinear.from_packed(PACKED, torch.arange(20.0)))
    layer[0].use_native()
    expected, _ = gradient_of(layer, inputs_of(tokens, 130))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient_of(compiled, inputs_of(tokens, 130))[0], expected)


@pytest.mark.parametrize("value_bits", [8, 16])
@pytest.mark.parametrize("tokens", [1, 20, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(value_bits, tokens, dtype, monkeypatch):
    gpu = pytest.importorskip("slablm.runtime.kernels.gpu", reason="triton is missing")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed = type(PACKED)(130, *(t.to(device) for t in (PACKED.values, PACKED.left, PACKED.right, PACKED.plane)), True)
    weight = to_gpu(packed, value_bits)
    inputs = inputs_of(tokens, 130, dtype=dtype).detach().to(device).requires_grad_()
    monkeypatch.setattr(gpu, "_TILE_BYTES", 130 * 4 * 7)  # several tiles
    monkeypatch.setattr(reference, "linear", None)
    gradient, weights = gradient_of(lambda x: kernels.linear(x, weight).cpu(), inputs)
    dense = reference.unpack(weight).cpu()
    truth, size = weights.double() @ dense.double(), weights.double().abs() @ dense.double().abs()
    assert ((gradient.cpu() - truth).abs() <= 2 * BOUNDS[dtype] * size).all()
