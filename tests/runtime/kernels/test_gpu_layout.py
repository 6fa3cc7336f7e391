from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.errors import SlabError
from slablm.packing import PackedSpec
from slablm.runtime.kernels import from_runtime, gpu_layout, reference, to_gpu
from slablm.runtime.kernels.gpu_layout import PADDING_VALUES, WORD_COLUMNS
from tests.runtime.kernels.weights import random_packed, specs

SPEC = PackedSpec(6, 130, 40, 1, True, torch.float16)


@given(specs(), st.integers(0, 2**31))
def test_layout_keeps_every_bit(spec, seed):
    packed = random_packed(spec, seed)
    weight = to_gpu(packed)
    assert torch.equal(reference.unpack(weight), packed.dense())
    back = from_runtime(weight)
    assert back.spec == packed.spec
    for name in ("values", "left", "right", "plane"):
        assert torch.equal(getattr(back, name), getattr(packed, name))


@given(specs(), st.integers(0, 2**31))
def test_offsets_count_the_values_in_front_of_each_word(spec, seed):
    packed = random_packed(spec, seed)
    weight, mask = to_gpu(packed), packed.unpack().mask
    for word in range(weight.offsets.shape[1]):
        assert torch.equal(weight.offsets[:, word].long(), mask[:, : word * WORD_COLUMNS].sum(dim=1))


@given(specs(), st.integers(0, 2**31), st.data())
def test_some_rows_are_those_of_all(spec, seed, data):
    weight = to_gpu(random_packed(spec, seed), value_bits=8)
    begin = data.draw(st.integers(0, spec.out_features))
    end = data.draw(st.integers(begin, spec.out_features))
    assert torch.equal(reference.unpack(weight, begin, end), reference.unpack(weight)[begin:end])


def test_laid_out_in_parts(monkeypatch):
    packed = random_packed(SPEC, 0)
    whole = to_gpu(packed)
    monkeypatch.setattr(gpu_layout, "_WEIGHTS_AT_ONCE", 130 * 4)  # 6 rows in parts of 4
    for name in ("planes", "offsets"):
        assert torch.equal(getattr(to_gpu(packed), name), getattr(whole, name))


def test_offsets_beyond_15_bits_are_unsigned():
    n = 40_000
    weight = to_gpu(random_packed(PackedSpec(1, n, n, 0, False, torch.float16), 0))
    assert (weight.offsets[0].long() % (1 << 16)).tolist() == list(range(0, n, WORD_COLUMNS))


def test_memory_is_two_and_a_half_bits_a_weight_beside_values_and_factors():
    m, n, kept = 64, 1024, 400
    weight = to_gpu(random_packed(PackedSpec(m, n, kept, 1, True, torch.float16), 0), value_bits=8)
    assert weight.nbytes == m * kept + PADDING_VALUES + 2.5 * m * n / 8 + 4 * m + 4 * (m + n)


@pytest.mark.parametrize("signs", [True, False])
def test_wrong_number_of_kept_entries_is_refused(signs):
    packed = random_packed(replace(SPEC, signs=signs), 0)
    plane = packed.plane.clone()
    plane[4] = 0 if signs else 0xFF
    with pytest.raises(SlabError, match="q_proj: corrupted plane, row 4"):
        to_gpu(replace(packed, plane=plane), name="q_proj")


def test_unknown_value_bits_are_refused():
    with pytest.raises(SlabError, match="value_bits must be 8 or 16, got 4"):
        to_gpu(random_packed(SPEC, 0), value_bits=4)


def test_more_kept_entries_than_an_offset_can_count_are_refused():
    spec = PackedSpec(1, 70_000, 65_536, 0, False, torch.float16)
    with pytest.raises(SlabError, match="q_proj keeps 65536 entries per row, the GPU kernels go up to 65535"):
        to_gpu(spec.from_parts(spec.empty()), name="q_proj")


def test_eight_bit_values_do_not_go_back():
    with pytest.raises(SlabError, match="load the checkpoint with 16-bit values"):
        from_runtime(to_gpu(random_packed(SPEC, 0), value_bits=8))
