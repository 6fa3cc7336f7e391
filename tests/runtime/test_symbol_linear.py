"""A layer with symbols: what a file holds is what runs."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from slablm.errors import SlabError
from slablm.methods.alphabet import grid_steps
from slablm.packing.symbols import pack_symbols
from slablm.runtime import kernels
from slablm.runtime.linear import SlabLinear
from tests.packing.test_symbols import random_symbols

PACKED = pack_symbols(random_symbols(20, 136, 4, 64, 8, 0))
OTHER = replace(pack_symbols(random_symbols(20, 136, 4, 64, 8, 1)), spec=PACKED.spec)  # the same rotation
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


def of_levels(*levels):
    """`PACKED` with other levels in front of its largest ones."""
    return replace(PACKED, levels=torch.tensor([0.0] * (len(PACKED.levels) - len(levels)) + [*levels]).half())


GRID, COARSE, FREE = of_levels(1, 2, 127), of_levels(1, 2, 4), of_levels(1, 50.5, 127)


@pytest.mark.parametrize(("packed", "steps"), [(GRID, 127), (COARSE, 4), (FREE, None)])
def test_the_grid_is_known_once_kernels_run(packed, steps):
    layer = copy.deepcopy(SlabLinear.from_packed(packed))
    assert layer.steps is None  # nothing was read from the levels
    layer.use_native()
    assert layer.steps == steps == grid_steps(packed.levels)


@pytest.mark.parametrize("assign", [False, True])
def test_the_grid_of_other_levels_is_found_anew(assign):
    """With the old one a GPU would round the levels to steps that they do not lie on."""
    layer = native_layer(GRID, bias=None)
    for packed in (COARSE, FREE, GRID):
        layer.load_state_dict(SlabLinear.from_packed(packed).state_dict(), assign=assign)
        assert layer.steps == grid_steps(packed.levels)


def test_the_grid_is_told_to_the_kernels(monkeypatch):
    told = []
    monkeypatch.setattr(kernels, "symbols_linear", lambda inputs, packed, steps: told.append(steps) or inputs)
    for packed in (GRID, FREE):
        native_layer(packed, bias=None)(INPUTS)
    assert told == [127, None]


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
    layer.levels[0] = -1
    with pytest.raises(SlabError, match="up_proj: corrupted scales, levels or factors"):
        layer.use_native(name="up_proj")


def test_shapes_alone_on_meta():
    layer = SlabLinear.from_packed(PACKED, BIAS).to("meta")
    assert layer(torch.empty(2, 136, device="meta")).shape == (2, 20)


def test_repr_says_what_it_is():
    assert "symbol_bits=4, group_size=64, rotation=8" in repr(SlabLinear.from_packed(PACKED))
