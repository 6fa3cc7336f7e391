"""A layer with symbols: what a file holds is what runs."""

import copy
import pickle

import pytest
import torch
from torch import nn

from slablm.errors import SlabError
from slablm.methods.rotation import Rotation
from slablm.runtime.linear import SlabLinear
from tests.runtime.kernels.weights import random_symbols

PACKED, OTHER = (random_symbols(20, 136, 4, Rotation(136, 8, 0), seed) for seed in range(2))
BIAS = torch.arange(20.0)
INPUTS = torch.randn(3, 136, generator=torch.Generator().manual_seed(0))


def native_layer(packed=PACKED, bias=BIAS):
    layer = copy.deepcopy(SlabLinear.from_packed(packed, bias))
    layer.use_native()
    return layer


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("tokens", [1, 40])
def test_native_forward_equals_the_reference(bias, tokens):
    inputs = torch.randn(tokens, 136, generator=torch.Generator().manual_seed(0))
    layer = SlabLinear.from_packed(PACKED, bias)
    expected = layer(inputs)
    dense = inputs @ PACKED.dense().T + (0 if bias is None else bias)
    torch.testing.assert_close(expected, dense, rtol=1e-5, atol=1e-5)
    layer.use_native()
    assert layer.runs_native
    error = torch.linalg.matrix_norm(layer(inputs) - expected) / torch.linalg.matrix_norm(expected)
    assert error < 1e-3
    layer.use_packed()
    assert torch.equal(layer(inputs), expected)


def test_the_layer_holds_the_file_and_nothing_else():
    layer = native_layer(bias=None)
    layer(INPUTS)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == PACKED.nbytes
    assert layer.state_dict().keys() == PACKED.parts().keys()
    assert all(torch.equal(tensor, PACKED.parts()[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
def test_it_loads_parts(assign):
    model = nn.Sequential(native_layer())
    state = SlabLinear.from_packed(OTHER, 2 * BIAS).state_dict(prefix="0.")
    assert model.load_state_dict(state, assign=assign) == ([], [])
    assert torch.equal(model(INPUTS), native_layer(OTHER, 2 * BIAS)(INPUTS))
    missing, _ = model.load_state_dict({}, strict=False)
    assert len(missing) == len(PACKED.parts()) + 1


def test_a_cast_leaves_the_stored_weight_alone():
    layer = native_layer().to(torch.bfloat16)
    assert all(torch.equal(tensor, PACKED.parts()[name]) for name, tensor in layer.packed.parts().items())
    assert layer(INPUTS.bfloat16()).dtype == torch.bfloat16


def test_copies_and_pickles_run_alike():
    layer = native_layer()
    expected = layer(INPUTS)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(INPUTS), expected)
        assert other.runs_native


def test_buffers_are_what_runs():
    layer, other = native_layer(bias=None), native_layer(OTHER, bias=None)
    expected = layer(INPUTS)
    swapped = torch.func.functional_call(layer, dict(other.named_buffers()), (INPUTS,))
    assert torch.equal(swapped, other(INPUTS))
    assert torch.equal(layer(INPUTS), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(backend):
    layer = native_layer()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert torch.equal(compiled(INPUTS), layer(INPUTS))


def test_there_are_no_values_to_quantize():
    with pytest.raises(SlabError, match="up_proj has symbols of 4 bits and no values to make 8 bits of"):
        SlabLinear.from_packed(PACKED).use_native(8, "up_proj")


def test_corrupted_parts_are_refused():
    layer = copy.deepcopy(SlabLinear.from_packed(PACKED))
    layer.scales[0] = -1
    with pytest.raises(SlabError, match="up_proj: corrupted scales"):
        layer.use_native(name="up_proj")


def test_shapes_alone_on_meta():
    layer = SlabLinear.from_packed(PACKED, BIAS).to("meta")
    assert layer(torch.empty(2, 136, device="meta")).shape == (2, 20)


def test_repr_says_what_it_is():
    assert "symbol_bits=4, rotation=8" in repr(SlabLinear.from_packed(PACKED))
