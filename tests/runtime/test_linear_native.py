import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from slablm.errors import SlabError
from slablm.packing import PackedSpec
from slablm.runtime.linear import SlabLinear
from tests.runtime.kernels.weights import random_packed

PACKED = random_packed(PackedSpec(20, 130, 50, 1, True, torch.float16), 0)
BIAS = torch.arange(20.0)


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("tokens", [1, 40])
def test_native_forward_equals_the_packed_one(bias, tokens):
    inputs = torch.randn(tokens, 130, generator=torch.Generator().manual_seed(0))
    layer = SlabLinear.from_packed(PACKED, bias)
    expected = layer(inputs)
    layer.use_native()
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-5)


def test_state_dict_and_way_back_are_bit_exact():
    layer = SlabLinear.from_packed(PACKED, BIAS)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.use_native()
    for state in (layer.state_dict(), copy.deepcopy(layer).state_dict()):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], before[name]) for name in before)
    layer.use_packed()
    assert layer.native is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_cast_leaves_the_stored_weight_alone():
    layer = SlabLinear.from_packed(PACKED)
    layer.use_native()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.packed.values, PACKED.values)


def test_another_device_goes_back_to_the_packed_layout():
    layer = SlabLinear.from_packed(PACKED)
    layer.use_native()
    layer.to("meta")
    assert layer.native is None
    assert layer.values.device.type == "meta"


def test_eight_bit_layers_are_not_saved():
    layer = SlabLinear.from_packed(PACKED)
    layer.use_native(value_bits=8)
    assert "native=int8" in repr(layer)
    with pytest.raises(SlabError, match="load the checkpoint with 16-bit values"):
        layer.state_dict()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(backend):
    layer = SlabLinear.from_packed(PACKED, BIAS)
    layer.use_native()
    inputs = torch.randn(2, 130, generator=torch.Generator().manual_seed(0))
    for other in (layer, copy.deepcopy(layer)):  # a copy has not run yet
        torch.compiler.reset()
        compiled = torch.compile(other, fullgraph=True, backend=backend)
        assert torch.equal(compiled(inputs), layer(inputs))


OTHER = random_packed(PackedSpec(20, 130, 50, 1, True, torch.float16), 1)
INPUTS = torch.randn(3, 130, generator=torch.Generator().manual_seed(0))


def native_layer(packed=PACKED, value_bits=16, bias=BIAS):
    layer = copy.deepcopy(SlabLinear.from_packed(packed, bias))  # what is loaded must not change the constants
    layer.use_native(value_bits)
    return layer


def state_of(packed):
    return SlabLinear.from_packed(packed, 2 * BIAS).state_dict()


@pytest.mark.parametrize("value_bits", [8, 16])
@pytest.mark.parametrize("assign", [False, True])
def test_a_native_layer_loads_packed_parts(value_bits, assign):
    model = nn.Sequential(native_layer(PACKED, value_bits))
    state = {f"0.{name}": tensor for name, tensor in state_of(OTHER).items()}
    assert model.load_state_dict(state, assign=assign) == ([], [])
    expected = native_layer(OTHER, value_bits, 2 * BIAS)
    assert torch.equal(model(INPUTS), expected(INPUTS))
    if value_bits == 16:
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_layer_loads_its_own_state():
    layer = native_layer()
    expected = layer(INPUTS)
    assert layer.load_state_dict(layer.state_dict()) == ([], [])
    assert torch.equal(layer(INPUTS), expected)


def test_loading_keeps_the_memory_of_the_layer():
    layer = native_layer()
    before = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    layer.load_state_dict(state_of(OTHER))
    assert {name: buffer.data_ptr() for name, buffer in layer.named_buffers()} == before


@pytest.mark.parametrize("value_bits", [8, 16])
def test_missing_and_unexpected_parts_are_reported(value_bits):
    layer = native_layer(value_bits=value_bits)
    expected = layer(INPUTS)
    for state in ({}, {"native_values": torch.zeros(3), "weight": torch.zeros(2)}):
        missing, unexpected = layer.load_state_dict(state, strict=False)
        assert (set(missing), set(unexpected)) == ({"values", "left", "right", "states", "bias"}, set(state))
        with pytest.raises(RuntimeError, match="Missing key.*values"):
            layer.load_state_dict(state)
    assert torch.equal(layer(INPUTS), expected)


def test_some_parts_are_enough_if_the_others_are_there():
    layer = native_layer()
    state = {"left": OTHER.left, "right": OTHER.right}
    missing, _ = layer.load_state_dict(state, strict=False)
    assert set(missing) == {"values", "states", "bias"}
    expected = replace(PACKED, left=OTHER.left, right=OTHER.right)
    assert torch.equal(layer(INPUTS), native_layer(expected)(INPUTS))
    with pytest.raises(RuntimeError, match="8-bit values cannot be turned back"):
        native_layer(value_bits=8).load_state_dict(state, strict=False)


@pytest.mark.parametrize("value_bits", [8, 16])
@pytest.mark.parametrize(
    ("part", "make", "message"),
    [
        ("values", lambda t: t[:, :-1], r"size mismatch for 0\.values: .*\[20, 49\].*\[20, 50\]"),
        ("states", lambda t: torch.full_like(t, 250), "0: corrupted state plane"),
        ("states", torch.zeros_like, "0: corrupted plane, row 0 keeps"),
    ],
)
def test_what_does_not_fit_is_reported_and_changes_nothing(part, make, message, value_bits):
    model = nn.Sequential(native_layer(value_bits=value_bits, bias=None))
    expected = model(INPUTS)
    state = {f"0.{name}": tensor for name, tensor in OTHER.parts().items()}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state | {f"0.{part}": make(state[f"0.{part}"])})
    assert torch.equal(model(INPUTS), expected)


def test_memory_is_seen():
    layer = native_layer()
    assert sum(buffer.nbytes for buffer in layer.buffers()) == layer.native.nbytes
    assert not any(name.startswith("native") for name in layer.state_dict())


def test_shared_memory_holds_the_weight():
    layer = native_layer()
    expected = layer(INPUTS)
    layer.share_memory()
    assert all(buffer.is_shared() for buffer in layer.buffers())
    assert torch.equal(layer(INPUTS), expected)  # the old addresses are gone
    layer.load_state_dict(state_of(OTHER))
    assert all(buffer.is_shared() for buffer in layer.buffers())
    assert torch.equal(layer(INPUTS), native_layer(OTHER, bias=2 * BIAS)(INPUTS))


@pytest.mark.parametrize("value_bits", [8, 16])
def test_copies_and_pickles_are_layers_of_their_own(value_bits):
    layer = native_layer(value_bits=value_bits)
    expected = layer(INPUTS)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert torch.equal(other(INPUTS), expected)
        buffers, tensors = {id(b) for b in other.buffers()}, {id(t) for t in other.native.tensors}
        assert buffers == tensors
        assert not tensors & {id(tensor) for tensor in layer.native.tensors}


def test_a_pickle_holds_the_weight_once():
    layer = native_layer(random_packed(PackedSpec(200, 500, 200, 1, True, torch.float16), 0), bias=None)
    layer(torch.zeros(1, 500))
    assert len(pickle.dumps(layer)) < 1.1 * layer.native.nbytes + 10_000


def test_buffers_are_what_runs():
    """Whoever replaces them, as `torch.func.functional_call` and accelerate do, replaces the weight."""
    layer, other = native_layer(bias=None), native_layer(OTHER, bias=None)
    expected = layer(INPUTS)
    swapped = torch.func.functional_call(layer, dict(other.named_buffers()), (INPUTS,))
    assert torch.equal(swapped, other(INPUTS))
    assert torch.equal(layer(INPUTS), expected)


def test_empty_memory_is_not_run():
    """`to_empty` asks for memory without a weight in it, which kernels must not read."""
    layer = native_layer()
    expected = layer(INPUTS)
    layer.to_empty(device="cpu")
    layer.bias.data = BIAS.clone()
    assert torch.equal(layer(INPUTS), expected)


def test_a_layer_on_meta_is_filled():
    layer = SlabLinear.from_packed(PACKED, BIAS).to("meta")
    layer.to_empty(device="cpu").load_state_dict(state_of(OTHER))
    assert torch.equal(layer(INPUTS), SlabLinear.from_packed(OTHER, 2 * BIAS)(INPUTS))
    layer = SlabLinear.from_packed(PACKED, BIAS).to("meta")
    layer.load_state_dict(state_of(OTHER), assign=True)
    assert torch.equal(layer(INPUTS), SlabLinear.from_packed(OTHER, 2 * BIAS)(INPUTS))


def test_assigned_parts_on_a_device_without_kernels_stay_packed():
    layer = native_layer()
    layer.load_state_dict({name: tensor.to("meta") for name, tensor in state_of(OTHER).items()}, assign=True)
    assert layer.native is None
    assert layer.values.is_meta
