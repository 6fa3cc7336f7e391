import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slablm.errors import SlabError
from slablm.packing import PackedSpec
from slablm.runtime import kernels
from slablm.runtime.kernels import backends, dispatch, native, reference, to_native
from tests.runtime.kernels.weights import error_bound, random_packed, specs

LIBRARY = native.load()
BACKENDS = (*(() if isinstance(LIBRARY, str) else LIBRARY.supported), "reference")
WEIGHT = to_native(random_packed(PackedSpec(20, 130, 50, 1, True, torch.float16), 0))


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(native, "load", lambda: "slablm was installed without its compiled kernels")
    backends._cpu_backend.cache_clear()
    yield
    backends._cpu_backend.cache_clear()


@pytest.fixture(params=BACKENDS)
def forced(request, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, request.param)
    return request.param


def inputs_of(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=60)
@given(specs(), st.sampled_from([8, 16]), st.integers(1, 64), st.integers(0, 2**31))
def test_every_number_of_tokens_equals_the_reference(spec, value_bits, tokens, seed):
    weight = to_native(random_packed(spec, seed), value_bits)
    inputs = inputs_of(tokens, spec.in_features, seed=seed)
    difference = (kernels.linear(inputs, weight) - inputs.double() @ reference.unpack(weight).double().T).abs()
    assert (difference <= error_bound(weight, inputs)).all()


def test_every_backend_equals_the_reference(forced):
    assert kernels.backend().name == forced
    for tokens in (1, 16, 17, 40):
        inputs = inputs_of(tokens, 130)
        torch.testing.assert_close(
            kernels.linear(inputs, WEIGHT), reference.linear(inputs, WEIGHT), rtol=1e-4, atol=1e-4
        )


def test_prefill_in_several_tiles(monkeypatch):
    monkeypatch.setattr(dispatch, "_TILE_BYTES", 130 * 4 * 7)  # 20 rows in tiles of 7
    inputs = inputs_of(50, 130)
    torch.testing.assert_close(kernels.linear(inputs, WEIGHT), reference.linear(inputs, WEIGHT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(130,), (1, 130), (2, 3, 130), (5, 10, 130), (0, 130)])
def test_leading_dimensions_and_types(dtype, shape):
    inputs = inputs_of(*shape, dtype=dtype)
    outputs = kernels.linear(inputs, WEIGHT)
    assert outputs.shape == (*shape[:-1], 20)
    assert outputs.dtype == dtype
    torch.testing.assert_close(outputs, reference.linear(inputs.float(), WEIGHT).to(dtype), rtol=2e-2, atol=5e-2)


def test_inputs_with_gaps():
    inputs = inputs_of(130, 3).T
    torch.testing.assert_close(kernels.linear(inputs, WEIGHT), reference.linear(inputs, WEIGHT), rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_the_reference():
    inputs = inputs_of(2, 130).requires_grad_()
    kernels.linear(inputs, WEIGHT).sum().backward()
    torch.testing.assert_close(inputs.grad, reference.unpack(WEIGHT).sum(0).expand(2, -1))


def test_without_a_library_the_reference_runs_and_says_so(no_library):
    assert kernels.backend().name == "reference"
    assert kernels.explain() == (
        "reference: slablm was installed without its compiled kernels: plain torch, no speed-up"
    )
    inputs = inputs_of(3, 130)
    assert torch.equal(kernels.linear(inputs, WEIGHT), reference.linear(inputs, WEIGHT))


def test_forcing_a_set_without_a_library_is_refused(no_library, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "portable")
    with pytest.raises(SlabError, match="SLABLM_KERNEL=portable cannot be used: slablm was installed without"):
        kernels.backend()


@pytest.mark.skipif(isinstance(LIBRARY, str), reason="no compiled kernels")
def test_forcing_an_unknown_set_is_refused(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "sse9")
    with pytest.raises(SlabError, match="SLABLM_KERNEL=sse9 cannot be used on this machine: choose one of .*reference"):
        kernels.backend()


@pytest.mark.skipif(isinstance(LIBRARY, str), reason="no compiled kernels")
def test_explain_names_the_fastest_set(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    assert kernels.explain() == f"{LIBRARY.supported[0]}: the fastest instruction set of this CPU"


@pytest.mark.parametrize("value_bits", [8, 16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_opcheck(value_bits, tokens):
    weight = to_native(random_packed(PackedSpec(20, 130, 50, 1, True, torch.float16), 0), value_bits)
    tensors = (weight.values, weight.scales, weight.planes, weight.left, weight.right)
    arguments = (inputs_of(tokens, 130), *tensors, weight.in_features)
    torch.library.opcheck(torch.ops.slablm.linear.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(backend):
    inputs = inputs_of(2, 3, 130)
    compiled = torch.compile(lambda x: kernels.linear(x, WEIGHT).relu(), fullgraph=True, backend=backend)
    assert torch.equal(compiled(inputs), kernels.linear(inputs, WEIGHT).relu())


@pytest.fixture
def fresh(monkeypatch):
    """Decisions about the GPU are made anew, and forgotten afterwards."""
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    backends._gpu_backend.cache_clear()
    yield
    backends._gpu_backend.cache_clear()


def test_without_triton_gpus_get_the_reference(fresh, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert kernels.explain("cuda") == (
        "reference: triton is missing (pip install 'slablm[triton]'): plain torch, no speed-up"
    )


def test_without_a_gpu_triton_does_not_run(fresh, monkeypatch):
    pytest.importorskip("triton")
    from slablm.runtime.kernels import gpu

    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.backend("cuda").name == "reference"
    assert kernels.explain("cuda").endswith("is there, but torch sees no GPU")


def test_other_devices_get_the_reference():
    assert kernels.explain("meta") == "reference: no kernels for meta"
