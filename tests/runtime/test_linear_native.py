import copy
from dataclasses import replace

import pytest
import torch

from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods import LayerStats
from slablm.methods.slab_plus import slab_plus
from slablm.packing import PackedSpec, pack
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
    assert list(layer.buffers()) == []
    for state in (layer.state_dict(), copy.deepcopy(layer).state_dict()):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], before[name]) for name in before)
    layer.use_packed()
    assert layer.native is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_way_back_with_a_grid(dtype):
    """Values on a grid are FP16; factors must not become so on the way back from the runtime."""
    weight = torch.randn(12, 80, generator=torch.Generator().manual_seed(0))
    gram = torch.eye(80)
    config = CompressionConfig(ratio=0.3, magnitude_bits=7, group_size=16)
    packed = pack(slab_plus(weight, LayerStats(gram.diagonal(), 1, weight[:0], gram), config), dtype)
    # Too small for FP16.
    packed = replace(packed, left=packed.left * 1e-3, right=packed.right * 1e-3)
    layer = SlabLinear.from_packed(packed)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert before["left"].dtype == dtype
    layer.use_native()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert torch.equal(layer.packed.dense(), packed.dense())
    layer.use_packed()
    assert layer.packed.values.dtype == torch.float16
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
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert torch.equal(compiled(inputs), layer(inputs))
