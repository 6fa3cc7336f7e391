"""Inputs, weights and the default device in different places: never a pointer that is none."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from slablm.errors import SlabError
from slablm.packing import PackedSpec
from slablm.runtime.kernels import to_native
from slablm.runtime.linear import SlabLinear
from slablm.runtime.narrow import NarrowLinear
from tests.runtime.kernels.weights import random_packed

META = torch.device("meta")
PACKED = random_packed(PackedSpec(20, 130, 50, 1, True, torch.float16), 0)
DENSE = torch.randn(20, 130, generator=torch.Generator().manual_seed(1)).half()


def slab(native=True, value_bits=16):
    layer = SlabLinear.from_packed(PACKED, torch.arange(20.0))
    if native:
        layer.use_native(value_bits)
    return layer


LAYERS = {
    "native": slab,
    "native, 8 bits": lambda: slab(value_bits=8),
    "packed": lambda: slab(native=False),
    "narrow": lambda: NarrowLinear(DENSE, None, torch.float32),
}


def inputs_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


@pytest.mark.parametrize("tokens", [1, 12, 40])
def test_the_default_device_changes_nothing(layer, tokens):
    inputs = inputs_of(tokens, 130)
    expected = layer(inputs)
    with META:
        assert torch.equal(layer(inputs), expected)
    torch.set_default_device("meta")
    try:
        assert torch.equal(layer(inputs), expected)
    finally:
        torch.set_default_device(None)


def test_gradients_do_not_ask_the_default_device(layer):
    inputs = inputs_of(3, 130).requires_grad_()
    layer(inputs).sum().backward()
    again = inputs.detach().clone().requires_grad_()
    with META:
        layer(again).sum().backward()
    assert torch.equal(again.grad, inputs.grad)


def test_layouts_are_made_where_the_weight_is():
    with META:
        weight, layer = to_native(PACKED), slab()
        layer.use_packed()
        dense = layer.packed.dense()
    assert torch.equal(weight.planes, to_native(PACKED).planes)
    assert torch.equal(dense, PACKED.dense())


@pytest.mark.parametrize("tokens", [1, 40])
def test_inputs_on_another_device_are_refused(layer, tokens):
    with pytest.raises(
        SlabError, match=r"the inputs are on meta, the weight is on cpu: move the inputs with \.to\('cpu'\)"
    ):
        layer(torch.empty(tokens, 130, device=META))


def test_inputs_of_another_width_are_refused(layer):
    with pytest.raises(SlabError, match=r"inputs of shape \[2, 65\] do not fit a layer with 130 input features"):
        layer(inputs_of(2, 65))


@pytest.mark.parametrize("name", ["native", "packed", "narrow"])
def test_a_layer_on_meta_gives_shapes(name):
    layer = LAYERS[name]().to(META)
    outputs = layer(torch.empty(2, 3, 130, device=META))
    assert outputs.is_meta
    assert outputs.shape == (2, 3, 20)
    with pytest.raises(SlabError, match="the inputs are on cpu, the weight is on meta"):
        layer(inputs_of(2, 130))


@pytest.mark.parametrize("name", LAYERS)
def test_fake_tensors_give_fake_outputs(name):
    layer = LAYERS[name]()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        outputs = layer(mode.from_tensor(inputs_of(2, 3, 130)))
    assert (outputs.shape, outputs.device.type) == ((2, 3, 20), "cpu")
    assert layer(inputs_of(1, 130)).isfinite().all()


def test_a_weight_that_was_moved_behind_its_back_is_refused():
    layer = slab()
    for name, buffer in list(layer.named_buffers()):
        layer._buffers[name] = buffer.to(META)
    with pytest.raises(SlabError, match=r"laid out for the CPU cannot be on meta: load the model"):
        layer(torch.empty(1, 130, device=META))
