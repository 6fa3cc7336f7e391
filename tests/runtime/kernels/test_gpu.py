"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter (see conftest)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slablm.packing import PackedSpec, PackedWeight
from slablm.runtime import kernels
from slablm.runtime.kernels import backends, dispatch, reference, to_gpu
from slablm.runtime.linear import SlabLinear
from tests.runtime.kernels.weights import random_packed, specs

pytest.importorskip("triton")
from slablm.runtime.kernels import gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WITHOUT_INTERPRETER = Path(__file__).with_name("compile_gpu.py")
BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "gpu.py"


def on_device(packed, value_bits=16):
    tensors = (t.to(DEVICE) for t in (packed.values, packed.left, packed.right, packed.plane))
    return to_gpu(PackedWeight(packed.in_features, *tensors, packed.signs), value_bits)


def weight_of(spec, seed, value_bits=16):
    return on_device(random_packed(spec, seed), value_bits)


def inputs_of(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error_bound(weight, inputs):
    """Largest possible error of each output, [t, m]: float32 sums."""
    return 1e-5 * inputs.double().abs() @ reference.unpack(weight).double().abs().T + 1e-12


WEIGHT = weight_of(PackedSpec(20, 130, 50, 1, True, torch.float16), 0)


@settings(max_examples=25)
@given(specs(), st.sampled_from([8, 16]), st.integers(1, 64), st.integers(0, 2**31))
def test_every_number_of_tokens_equals_the_reference(spec, value_bits, tokens, seed):
    weight = weight_of(spec, seed, value_bits)
    inputs = inputs_of(tokens, spec.in_features, seed=seed)
    difference = (gpu.linear(inputs, weight) - inputs.double() @ reference.unpack(weight).double().T).abs()
    assert (difference <= error_bound(weight, inputs)).all()


@settings(max_examples=25)
@given(specs(), st.sampled_from([8, 16]), st.integers(0, 2**31), st.data())
def test_unpacked_rows_are_those_of_the_reference(spec, value_bits, seed, data):
    weight = weight_of(spec, seed, value_bits)
    begin = data.draw(st.integers(0, spec.out_features - 1))
    end = data.draw(st.integers(begin + 1, spec.out_features))
    rows = gpu.unpack(weight, begin, end, torch.float32)
    torch.testing.assert_close(rows, reference.unpack(weight, begin, end), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tokens", [1, gpu.MATVEC_TOKENS, gpu.MATVEC_TOKENS + 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value_bits", [8, 16])
def test_half_precision_inputs(tokens, dtype, value_bits):
    weight = weight_of(PackedSpec(20, 130, 50, 2, True, dtype), 1, value_bits)
    inputs = inputs_of(tokens, 130, dtype=dtype)
    truth = inputs.double() @ reference.unpack(weight).double().T
    outputs = gpu.linear(inputs, weight)
    assert outputs.dtype == dtype
    step = torch.finfo(dtype).eps
    bound = step * (inputs.double().abs() @ reference.unpack(weight).double().abs().T + truth.abs())
    assert ((outputs - truth).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(130,), (2, 3, 130), (5, 10, 130), (0, 130)])
def test_leading_dimensions_and_types(dtype, shape):
    inputs = inputs_of(*shape, dtype=dtype)
    outputs = kernels.linear(inputs, WEIGHT)
    assert outputs.shape == (*shape[:-1], 20)
    assert outputs.dtype == dtype
    torch.testing.assert_close(outputs, reference.linear(inputs.float(), WEIGHT).to(dtype), rtol=2e-2, atol=5e-2)


def test_inputs_with_gaps():
    inputs = inputs_of(130, 3).T
    torch.testing.assert_close(kernels.linear(inputs, WEIGHT), reference.linear(inputs, WEIGHT), rtol=1e-5, atol=1e-5)


def test_prefill_in_several_tiles(monkeypatch):
    monkeypatch.setattr(gpu, "_TILE_BYTES", 130 * 4 * 7)  # 20 rows in tiles of 7
    inputs = inputs_of(gpu.MATVEC_TOKENS + 1, 130)
    torch.testing.assert_close(kernels.linear(inputs, WEIGHT), reference.linear(inputs, WEIGHT), rtol=1e-5, atol=1e-5)


def test_values_behind_32767_are_found():
    weight = weight_of(PackedSpec(1, 40_000, 39_990, 1, True, torch.float16), 0)
    inputs = torch.zeros(1, 40_000, device=DEVICE)
    inputs[0, 39_000:] = 1
    torch.testing.assert_close(gpu.linear(inputs, weight), reference.linear(inputs, weight), rtol=1e-4, atol=1e-3)


def test_values_of_the_next_row_do_not_matter():
    """Of the four values that are loaded for a group, some may belong to the next row."""
    packed = random_packed(PackedSpec(4, 64, 1, 1, True, torch.float16), 0)
    packed.values[1::2] = torch.inf
    outputs = gpu.linear(torch.ones(1, 64, device=DEVICE), on_device(packed))
    assert outputs[0].isfinite().tolist() == [True, False, True, False]


def test_gradients_flow_through_the_reference():
    inputs = inputs_of(2, 130).requires_grad_()
    kernels.linear(inputs, WEIGHT).sum().backward()
    torch.testing.assert_close(inputs.grad, reference.unpack(WEIGHT).sum(0).expand(2, -1))


def test_the_reference_can_be_forced(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    monkeypatch.setattr(gpu, "linear", None)
    assert kernels.explain("cuda") == "reference: forced by SLABLM_KERNEL"
    inputs = inputs_of(1, 130)
    assert torch.equal(kernels.linear(inputs, WEIGHT), reference.linear(inputs, WEIGHT))


@pytest.fixture
def layer(monkeypatch):
    """A layer with bias on the device, in GPU layout; and what it stored before."""
    monkeypatch.setattr(dispatch, "to_native", to_gpu)  # without a GPU the layer is on the CPU
    layer = SlabLinear.from_packed(
        random_packed(PackedSpec(20, 130, 50, 1, True, torch.float16), 0), torch.arange(20.0)
    ).to(DEVICE)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.use_native()
    assert isinstance(layer.native, kernels.GpuWeight)
    return layer, stored


def test_a_layer_runs_and_is_saved(layer):
    layer, stored = layer
    inputs = inputs_of(2, 3, 130)
    expected = reference.linear(inputs, layer.native) + stored["bias"]
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-5)
    assert {id(buffer) for buffer in layer.buffers()} == {id(tensor) for tensor in layer.native.tensors}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in layer.state_dict().items())
    layer.to(torch.bfloat16)
    assert isinstance(layer.native, kernels.GpuWeight)
    layer.use_packed()
    assert all(torch.equal(tensor, stored[name].to(tensor)) for name, tensor in layer.state_dict().items())


def test_an_eight_bit_layer(layer):
    layer, _ = layer
    layer.use_native(value_bits=8)
    assert "native=int8" in repr(layer)
    inputs = inputs_of(1, 130)
    torch.testing.assert_close(layer(inputs) - layer.bias, reference.linear(inputs, layer.native), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("value_bits", [8, 16])
def test_opcheck(value_bits, tokens):
    weight = weight_of(PackedSpec(20, 130, 50, 1, True, torch.float16), 0, value_bits)
    tensors = (weight.values, weight.scales, weight.planes, weight.offsets, weight.left, weight.right)
    arguments = (inputs_of(tokens, 130), *tensors)
    # An interpreted kernel cannot be traced: see test_compiles_for_gpus.
    traced = ("test_aot_dispatch_dynamic",) if DEVICE.type == "cuda" else ()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", *traced)
    torch.library.opcheck(torch.ops.slablm.gpu_linear.default, arguments, test_utils=tests)


def test_compiles_without_graph_breaks():
    inputs = inputs_of(2, 3, 130)
    compiled = torch.compile(lambda x: kernels.linear(x, WEIGHT).relu(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(inputs), kernels.linear(inputs, WEIGHT).relu())


def test_compiles_for_gpus():
    """Without the interpreter, and without a GPU: every kernel becomes machine code, and the operator can be traced."""
    command = [sys.executable, str(WITHOUT_INTERPRETER)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"TRITON_INTERPRET": "0"}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_the_benchmark_measures_nothing_without_a_gpu():
    done = subprocess.run([sys.executable, str(BENCHMARK)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == ("benchmarks/gpu.py needs a CUDA machine, and torch sees no GPU here: nothing was measured\n")
