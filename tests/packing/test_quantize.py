import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm import SlabError
from slablm.packing import quantize
from slablm.packing.quantize import quantize_rows, quantize_values


@given(st.integers(1, 20), st.integers(1, 50), st.floats(1e-6, 1e4), st.integers(0, 2**31))
def test_error_is_half_a_step_and_the_largest_is_127(rows, kept, size, seed):
    values = size * torch.randn(rows, kept, generator=torch.Generator().manual_seed(seed))
    quantized, scales = quantize_values(values)
    assert quantized.dtype == torch.int8
    assert (quantized.abs().amax(dim=1) == 127).all()
    assert ((quantized * scales[:, None] - values).abs() <= 0.5001 * scales[:, None]).all()


def test_rows_of_zeros_and_tiny_float16_values():
    values = torch.tensor([[0.0, 0.0], [6e-8, -6e-8], [65504.0, -1.0]], dtype=torch.float16)
    quantized, scales = quantize_values(values)
    assert quantized.tolist() == [[0, 0], [127, -127], [127, 0]]
    assert scales[0] == 1


@given(
    st.integers(1, 20),
    st.integers(1, 50),
    st.floats(1e-9, 1e5),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_scales_of_rows_are_the_least_that_clip_nothing(rows, columns, size, dtype, seed):
    weight = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight = weight.clamp(-60000, 60000).to(dtype)
    quantized, scales = quantize_rows(weight)
    assert (quantized.dtype, scales.dtype) == (torch.int8, torch.float16)
    weight, wide = weight.double(), scales.double()
    largest = weight.abs().amax(dim=1)
    below = (scales.view(torch.int16) - 1).clamp_min(0).view(torch.float16).double()
    assert (127 * wide >= largest).all()
    assert ((127 * below < largest) | (largest == 0)).all()
    error = (quantized.double() * wide[:, None] - weight).abs()
    assert (error <= 0.500001 * wide[:, None]).all()
    assert (quantized.abs().amax(dim=1)[wide > 1e-3] == 127).all()


def test_rows_of_zeros_have_scale_0_and_the_smallest_numbers_do_not():
    quantized, scales = quantize_rows(torch.tensor([[0.0, -0.0], [1e-30, 0.0], [60.0 * 2**-24, -(2.0**-24)]]))
    assert scales.tolist() == [0, 2**-24, 2**-24]
    assert quantized.tolist() == [[0, 0], [0, 0], [60, -1]]


def test_rows_are_rounded_in_pieces(monkeypatch):
    weight = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    whole = quantize_rows(weight)
    monkeypatch.setattr(quantize, "ENTRIES_AT_ONCE", 7 * 30)
    assert all(map(torch.equal, quantize_rows(weight), whole))


def test_a_scale_beyond_fp16_is_refused():
    assert quantize_rows(torch.tensor([[65504.0 * 127]]))[1].tolist() == [65504]
    with pytest.raises(SlabError, match=r"lm_head: a value does not fit .*: use --head-bits 16"):
        quantize_rows(torch.tensor([[0.0], [65504.0 * 128]]), "lm_head")


def test_on_the_meta_device_rows_have_a_shape():
    quantized, scales = quantize_rows(torch.empty(5, 3, device="meta"))
    assert quantized.is_meta
    assert (quantized.shape, scales.shape) == ((5, 3), (5,))
