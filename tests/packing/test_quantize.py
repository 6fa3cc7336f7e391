import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.packing.quantize import quantize_values


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
