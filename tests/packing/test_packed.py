from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm import SlabError, decompose
from slablm.methods.decomposition import Decomposition
from slablm.packing import PackedSpec, pack


@st.composite
def decompositions(draw):
    """Random decompositions of any shape, budget and rank, with and without signs."""
    m, n = draw(st.integers(1, 17)), draw(st.integers(1, 43))
    k, rank = draw(st.integers(1, n)), draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    order = torch.rand(m, n, generator=generator).argsort(dim=1)
    return Decomposition(
        mask=order < k,
        values=torch.randn(m, k, generator=generator),
        left=torch.randn(m, rank, generator=generator),
        right=torch.randn(rank, n, generator=generator),
        signs=(torch.rand(m, n, generator=generator) < 0.5) if draw(st.booleans()) else None,
    )


@given(decompositions(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_packing_is_bit_exact(decomposition, dtype):
    packed = pack(decomposition, dtype)
    parts = {part: getattr(decomposition, part).to(dtype) for part in ("values", "left", "right")}
    rounded = replace(decomposition, **parts)
    assert torch.equal(packed.dense(), rounded.dense())
    assert torch.equal(packed.unpack().dense(), rounded.dense())
    again = pack(packed.unpack(), dtype)
    for part in ("values", "left", "right", "plane"):
        assert torch.equal(getattr(again, part), getattr(packed, part))
    packed.validate("layer")


@given(decompositions())
def test_spec_allocates_the_same_shapes(decomposition):
    packed = pack(decomposition, torch.float16)
    parts, empty = packed.parts(), packed.spec.empty()
    assert parts.keys() == empty.keys()
    for part, tensor in parts.items():
        assert empty[part].shape == tensor.shape
        assert empty[part].dtype == tensor.dtype
    assert packed.spec.from_parts(parts).spec == packed.spec
    assert packed.nbytes == sum(tensor.nbytes for tensor in parts.values())
    assert packed.spec.paper_bits == decomposition.bits()


def test_true_size_at_50_percent():
    weight = torch.randn(576, 576, generator=torch.Generator().manual_seed(0))
    packed = pack(decompose(weight, iterations=2), torch.float16)
    # 250 values of 16 bits, ⌈576/5⌉ = 116 bytes of states per row, and the factors.
    assert packed.nbytes == 576 * (250 * 2 + 116) + 2 * 576 * 2
    assert 8 * packed.nbytes / 576**2 < 8.75


@pytest.mark.parametrize("method", ["slab", "wanda"])
def test_corrupted_planes_are_refused(method):
    packed = pack(decompose(torch.randn(12, 40), method=method), torch.float16)
    packed.plane[4, 2] = 0 if packed.plane[4, 2] else 1
    with pytest.raises(SlabError, match="layer: corrupted plane, row 4 keeps"):
        packed.validate("layer")


def test_unused_byte_values_are_refused():
    packed = pack(decompose(torch.randn(12, 40)), torch.float16)
    packed.plane[0, 0] = 250
    with pytest.raises(SlabError, match="layer: corrupted state plane"):
        packed.validate("layer")


def test_overflow_of_half_precision_is_refused():
    weight = torch.randn(12, 40)
    weight[0, 0] = 1e5
    decomposition = decompose(weight)
    with pytest.raises(SlabError, match="does not fit into torch.float16"):
        pack(decomposition, torch.float16, "layer")
    assert pack(decomposition, torch.bfloat16).dense()[0, 0] == pytest.approx(1e5, rel=0.01)


def test_spec_of_a_bitmap():
    spec = PackedSpec(3, 17, kept=4, rank=0, signs=False, value_dtype=torch.float16)
    assert spec.empty()["positions"].shape == (3, 3)
