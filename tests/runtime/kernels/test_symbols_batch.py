"""Many tokens straight from symbols: what the dense weight gives, up to the rounding of inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slablm.errors import SlabError
from slablm.methods.rotation import Rotation
from slablm.runtime import kernels
from slablm.runtime.kernels import backends, native, symbols
from tests.runtime.kernels.test_symbols import inputs_of, relative_error, rotated, truth_of, weights
from tests.runtime.kernels.weights import random_symbols

LIBRARY = native.load()
BATCHED = () if isinstance(LIBRARY, str) else LIBRARY.batched
pytestmark = pytest.mark.skipif(not BATCHED, reason="no kernel for many tokens on this CPU")
# Half a step, where the largest input has so many; columns that share a scale.
STEPS = {14: 8191, 8: 127}
SEGMENT = {True: 2048, False: 128}


def bound_of(inputs, weight, bits):
    """Largest possible error of each output, [t, m]."""
    is_rotated = weight.spec.rotation is not None
    steps = STEPS[bits if is_rotated else 14]
    parts = rotated(inputs, weight).abs().split(SEGMENT[is_rotated], dim=1)
    largest = torch.cat([part.amax(dim=1, keepdim=True).expand_as(part) for part in parts], dim=1)
    dense = weight.unpack().rotated_dense().double().abs()
    # With 8 bits the sum of the inputs may lose half a unit in each lane, of entries up to 1 in 256.
    lost = 0.0 if bits == 14 else 16 * 0.5 / 128 * weight.scales.double() * largest.amax(dim=1, keepdim=True) / steps
    return (2e-5 + 0.51 / steps) * largest @ dense.T + lost + 1e-12


@settings(max_examples=80)
@given(weights(), st.integers(0, 40), st.sampled_from([14, 8]), st.integers(0, 2**31))
def test_it_equals_the_reference(weight, tokens, bits, seed):
    inputs = inputs_of(tokens, weight.in_features, seed=seed)
    for name in BATCHED:
        outputs = native.symbols_matmul(LIBRARY, name, weight, inputs, bits)
        assert ((outputs - truth_of(inputs, weight)).abs() <= bound_of(inputs, weight, bits)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_have_the_type_of_the_inputs(dtype):
    weight = random_symbols(70, 192, 4, Rotation(192, 64, 3), 0)
    inputs = inputs_of(2, 9, 192, dtype=dtype)
    outputs = native.symbols_matmul(LIBRARY, BATCHED[0], weight, inputs, 14)
    assert (outputs.dtype, outputs.shape) == (dtype, (2, 9, 70))
    assert relative_error(outputs.flatten(0, 1), truth_of(inputs.flatten(0, 1).float(), weight)) < 1e-2


@pytest.mark.parametrize("rotation", [None, Rotation(4608, 512, 1)])
@pytest.mark.parametrize("bits", STEPS)
def test_long_rows_have_segments_and_many_tokens_are_taken_in_turns(rotation, bits):
    """More than 2048 columns, and than 1024 tokens; a token of the second turn stands at its place."""
    weight = random_symbols(9, 4608, 3, rotation, 0)
    inputs = inputs_of(1030, 4608)
    outputs = native.symbols_matmul(LIBRARY, BATCHED[0], weight, inputs, bits)
    assert ((outputs - truth_of(inputs, weight)).abs() <= bound_of(inputs, weight, bits)).all()


def test_the_largest_sums_fit_into_32_bits():
    """Every product of the largest byte and the largest input, all of one sign."""
    weight = random_symbols(4, 8192, 2, Rotation(8192, 1, 0), 0)
    weight.symbols.zero_()
    weight.levels.fill_(127)
    inputs = weight.spec.rotation.restore(torch.ones(5, 8192)).contiguous()
    truth = truth_of(inputs, weight)
    for bits in STEPS:
        outputs = native.symbols_matmul(LIBRARY, BATCHED[0], weight, inputs, bits)
        assert relative_error(outputs, truth) < 1e-3


@pytest.mark.parametrize("rotation", [None, Rotation(128, 128, 1)])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_left_to_the_reference(rotation, value):
    weight = random_symbols(8, 128, 4, rotation, 0)
    inputs = inputs_of(20, 128)
    inputs[17, 5] = value
    assert native.symbols_matmul(LIBRARY, BATCHED[0], weight, inputs, 14) is None
    outputs = kernels.symbols_linear(inputs, weight)
    assert not outputs[17].isfinite().any()
    assert outputs[:17].isfinite().all()


def test_threads_do_not_matter(monkeypatch):
    weight = random_symbols(500, 320, 5, Rotation(320, 64, 9), 0)
    inputs = inputs_of(300, 320)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(native.symbols_matmul(LIBRARY, BATCHED[0], weight, inputs, 14))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("tokens", "function"), [(4, "symbols_matvec"), (5, "symbols_matmul")])
def test_layers_take_it_from_five_tokens_on(tokens, function, monkeypatch):
    weight, called = random_symbols(8, 128, 4, None, 0), []
    run = getattr(native, function)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, BATCHED[0])
    monkeypatch.setattr(native, function, lambda *args: called.append(args[4:]) or run(*args))
    kernels.symbols_linear(inputs_of(tokens, 128), weight)
    assert called == [(14,)[: tokens - 4]]


def test_the_environment_asks_for_8_bits(monkeypatch):
    weight, inputs = random_symbols(64, 128, 4, Rotation(128, 128, 1), 0), inputs_of(30, 128)
    truth = truth_of(inputs, weight)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, BATCHED[0])
    assert relative_error(symbols.linear(inputs, weight), truth) < 5e-4
    monkeypatch.setenv(backends.ACTIVATION_VARIABLE, "8")
    assert 2e-3 < relative_error(symbols.linear(inputs, weight), truth) < 2e-2
    monkeypatch.setenv(backends.ACTIVATION_VARIABLE, "7")
    with pytest.raises(SlabError, match="SLABLM_ACTIVATION_BITS must be 8 or 14, got '7'"):
        symbols.linear(inputs, weight)


def test_other_bits_are_refused():
    weight = random_symbols(8, 128, 4, None, 0)
    with pytest.raises(RuntimeError, match="refused its arguments"):
        native.symbols_matmul(LIBRARY, BATCHED[0], weight, inputs_of(5, 128), 12)
