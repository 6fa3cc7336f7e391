import pytest
import torch
from hypothesis import given
from torch.nn import functional

from slablm import SlabLinear
from slablm.packing import pack
from tests.packing.test_packed import decompositions


@given(decompositions())
def test_forward_is_the_dense_product(decomposition):
    packed = pack(decomposition, torch.float16)
    m, n = decomposition.shape
    bias = torch.randn(m)
    inputs = torch.randn(2, 3, n)
    expected = functional.linear(inputs, packed.dense(), bias)
    assert torch.allclose(SlabLinear.from_packed(packed, bias)(inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_the_inputs_dtype(dtype):
    torch.manual_seed(0)
    from slablm import decompose

    packed = pack(decompose(torch.randn(24, 40)), torch.float16)
    inputs = torch.randn(5, 40)
    output = SlabLinear.from_packed(packed, torch.zeros(24)).to(dtype)(inputs.to(dtype))
    assert output.dtype == dtype
    exact = inputs @ packed.dense().T
    assert ((output.float() - exact).norm() / exact.norm()) < {torch.float32: 1e-6}.get(dtype, 1e-2)


def test_casting_the_model_leaves_the_stored_weight_alone():
    from slablm import decompose

    packed = pack(decompose(torch.randn(24, 40)), torch.float16)
    layer = SlabLinear.from_packed(packed, torch.zeros(24))
    before = packed.dense()
    layer.to(torch.bfloat16)
    assert layer.values.dtype == torch.float16
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.packed.dense(), before)
    assert layer.to("meta").values.is_meta
    assert layer.values.dtype == torch.float16


def test_state_dict_names_and_repr():
    from slablm import decompose

    slab = SlabLinear.from_packed(pack(decompose(torch.randn(24, 40)), torch.float16))
    pruned = SlabLinear.from_packed(pack(decompose(torch.randn(24, 40), method="wanda"), torch.float16))
    assert set(slab.state_dict()) == {"values", "left", "right", "states"}
    assert set(pruned.state_dict()) == {"values", "left", "right", "positions"}
    assert "in_features=40, out_features=24" in repr(slab)
    assert "signs=False" in repr(pruned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unpacked_layer_computes_the_same_bits(dtype):
    from slablm import decompose

    layer = SlabLinear.from_packed(pack(decompose(torch.randn(24, 40)), torch.float16), torch.randn(24)).to(dtype)
    inputs = torch.randn(3, 40, dtype=dtype)
    assert torch.equal(layer.unpacked(dtype)(inputs), layer(inputs))
