from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.errors import SlabError
from slablm.packing import PackedSpec, PackedWeight
from slablm.runtime.kernels import from_runtime, reference, to_native
from tests.runtime.kernels.weights import random_packed, specs

SPEC = PackedSpec(6, 130, 40, 1, True, torch.float16)


@given(specs(), st.integers(0, 2**31))
def test_layout_keeps_every_bit(spec, seed):
    packed = random_packed(spec, seed)
    weight = to_native(packed)
    assert torch.equal(reference.unpack(weight), packed.dense())
    back = from_runtime(weight)
    assert back.spec == packed.spec
    for name in ("values", "left", "right", "plane"):
        assert torch.equal(getattr(back, name), getattr(packed, name))


@given(specs(), st.integers(0, 2**31), st.data())
def test_some_rows_are_those_of_all(spec, seed, data):
    weight = to_native(random_packed(spec, seed), value_bits=8)
    begin = data.draw(st.integers(0, spec.out_features))
    end = data.draw(st.integers(begin, spec.out_features))
    assert torch.equal(reference.unpack(weight, begin, end), reference.unpack(weight)[begin:end])


@given(specs(), st.integers(0, 2**31))
def test_eight_bit_values_are_off_by_half_a_step(spec, seed):
    packed = random_packed(spec, seed)
    weight = to_native(packed, value_bits=8)
    dense, quantized = packed.dense(), reference.unpack(weight)
    kept = packed.unpack().mask
    assert torch.equal(dense[~kept], quantized[~kept])
    assert ((dense - quantized).abs() <= 0.5001 * weight.scales[:, None])[kept].all()


def test_memory_is_two_bits_a_weight_beside_values_and_factors():
    m, n, kept = 64, 1024, 400
    weight = to_native(random_packed(PackedSpec(m, n, kept, 1, True, torch.float16), 0), value_bits=8)
    assert weight.nbytes == m * kept + 64 + 2 * m * n // 8 + 4 * m + 4 * (m + n)


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("value_bits", [8, 16])
def test_wrong_number_of_kept_entries_is_refused(signs, value_bits):
    packed = random_packed(replace(SPEC, signs=signs), 0)
    plane = packed.plane.clone()
    plane[4] = 0 if signs else 0xFF
    with pytest.raises(SlabError, match="q_proj: corrupted plane, row 4"):
        to_native(replace(packed, plane=plane), value_bits, name="q_proj")


def test_a_kept_bit_behind_the_last_column_is_refused():
    packed = random_packed(PackedSpec(1, 3, 2, 0, False, torch.float16), 0)
    plane = torch.tensor([[0b1001]], dtype=torch.uint8)  # two bits, but only one of them is a column
    with pytest.raises(SlabError, match="row 0 keeps 1 entries where 2 values are stored"):
        to_native(replace(packed, plane=plane))


def test_unused_state_bytes_are_refused():
    packed = random_packed(SPEC, 0)
    packed.plane[2, 3] = 250
    with pytest.raises(SlabError, match="a byte above 242"):
        to_native(packed)


def test_unknown_value_bits_are_refused():
    with pytest.raises(SlabError, match="value_bits must be 8 or 16, got 4"):
        to_native(random_packed(SPEC, 0), value_bits=4)


def test_eight_bit_values_do_not_go_back():
    with pytest.raises(SlabError, match="load the checkpoint with 16-bit values"):
        from_runtime(to_native(random_packed(SPEC, 0), value_bits=8))


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("values", lambda t: t[:-1].clone()),
        ("values", lambda t: t.float()),
        ("scales", lambda t: None),
        ("scales", lambda t: t.double()),
        ("planes", lambda t: t[:, :-1].clone()),
        ("planes", lambda t: t.repeat(1, 1, 2)),
        ("left", lambda t: t[:-1].clone()),
        ("right", lambda t: t[:, :-1].clone()),
        ("in_features", lambda n: n + 64),
    ],
)
def test_wrong_shapes_and_types_are_refused(field, make):
    weight = to_native(random_packed(SPEC, 0), value_bits=8)
    with pytest.raises(SlabError, match="not a runtime weight"):
        replace(weight, **{field: make(getattr(weight, field))})


def test_tensors_may_not_be_views_with_gaps():
    weight = to_native(random_packed(SPEC, 0))
    planes = torch.stack([weight.planes, weight.planes], dim=-1)[..., 0]
    with pytest.raises(SlabError, match="not a runtime weight"):
        replace(weight, planes=planes)


def test_packed_weights_without_kept_entries_work():
    packed = PackedWeight(
        in_features=10,
        values=torch.zeros(2, 0, dtype=torch.float16),
        left=torch.ones(2, 1, dtype=torch.float16),
        right=torch.ones(1, 10, dtype=torch.float16),
        plane=torch.full((2, 2), 121, dtype=torch.uint8),  # 1 1 1 1 1
        signs=True,
    )
    assert torch.equal(reference.unpack(to_native(packed)), torch.ones(2, 10))
