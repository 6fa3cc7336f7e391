from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm import SlabError
from slablm.methods.budget import coded_bytes, kept_within, signs_in_codes
from slablm.methods.decomposition import Decomposition
from slablm.methods.grid import LARGEST_BITS, OFFSETS, ValueGrid, fit_grid
from slablm.methods.select import kept_columns
from slablm.packing import pack
from slablm.packing.coded import pack_codes, unpack_codes


def on_a_grid(weight, kept, bits, group_size, generator=None):
    """A decomposition that keeps random entries, on the grid that fits them."""
    m, n = weight.shape
    mask = torch.rand(m, n, generator=generator).argsort(dim=1) < kept
    grid = fit_grid(weight, mask, torch.ones(n), bits, group_size)
    values = weight[mask].view(m, kept)
    return Decomposition(
        mask=mask,
        values=torch.copysign(grid.nearest(values.abs(), kept_columns(mask, kept)), values),
        left=torch.rand(m, 1, generator=generator),
        right=torch.rand(1, n, generator=generator),
        signs=weight < 0,
        grid=grid,
    )


@st.composite
def coded(draw):
    """Random decompositions with values on a grid: any shape, budget, number of bits, group and magnitude."""
    m, n = draw(st.integers(1, 9)), draw(st.integers(1, 43))
    k, bits, group_size = draw(st.integers(1, n)), draw(st.integers(1, LARGEST_BITS)), draw(st.integers(1, 50))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    weight = torch.randn(m, n, generator=generator) * 10.0 ** draw(st.integers(-8, 2))
    return on_a_grid(weight, k, bits, group_size, generator)


@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 8), st.integers(0, 1000))
def test_codes_round_trip_bit_by_bit(m, k, bits, seed):
    codes = torch.randint(0, 2**bits, (m, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (m, -(-k * bits // 8))
    for row, row_codes in zip(packed, codes, strict=True):
        number = int.from_bytes(bytes(row.tolist()), "little")
        assert number == sum(int(code) << (bits * i) for i, code in enumerate(row_codes))
    assert torch.equal(unpack_codes(packed, bits, k), codes)


@given(coded(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_parts_are_bit_exact(decomposition, dtype):
    packed = pack(decomposition, dtype)
    parts = packed.parts()
    assert packed.nbytes == sum(tensor.nbytes for tensor in parts.values())
    shape, k, grid = decomposition.shape, decomposition.kept, decomposition.grid
    assert packed.nbytes == coded_bytes(shape, k, grid.bits, grid.group_size)
    again = packed.spec.from_parts(parts)
    assert again.spec == packed.spec
    assert torch.equal(again.values, packed.values)
    assert torch.equal(again.plane, packed.plane)
    assert torch.equal(again.dense(), packed.dense())
    for name, tensor in again.parts().items():
        assert torch.equal(tensor, parts[name])
    types = {"values": torch.float16, "left": dtype, "right": dtype}
    rounded = {part: getattr(decomposition, part).to(types[part]) for part in types}
    assert torch.equal(packed.dense(), replace(decomposition, grid=None, **rounded).dense())


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", range(1, LARGEST_BITS + 1))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_code_is_found_again_at_every_scale(dtype, bits, offset):
    """As bfloat16 numbers, 127 at scale 1 and offset 1.5 came back as 126: another weight than the one measured."""
    width, m = 2**bits, 1024
    grid = ValueGrid((1 + torch.arange(m)[:, None] / m).half(), torch.full((m,), offset).half(), bits, width)
    codes = torch.arange(width, dtype=torch.uint8).expand(m, -1)
    values = grid.magnitudes(codes, torch.arange(width))
    mask = torch.ones(m, width, dtype=torch.bool)
    packed = pack(Decomposition(mask, values, torch.ones(m, 1), torch.ones(1, width), ~mask, grid), dtype)
    parts = packed.parts()
    assert torch.equal(unpack_codes(parts["codes"], bits + packed.spec.sign_in_code, width), codes)
    assert torch.equal(packed.spec.from_parts(parts).values, packed.values)
    # Nothing is lost but the last bits of FP16 numbers: a sixteenth of a step where bfloat16 lost half of one.
    steps = (packed.values.float() - values).abs() / grid.scales.float()
    assert steps.max() <= 0.5 * 2.0**-10 * (offset + width)


def test_a_magnitude_that_fits_into_bfloat16_alone():
    """Another value type would not help."""
    decomposition = on_a_grid(torch.full((1, 8), 3e6), kept=8, bits=7, group_size=8)
    with pytest.raises(SlabError, match="layer: a value does not fit into torch.float16: ignore this layer"):
        pack(decomposition, torch.bfloat16, "layer")


@given(coded())
def test_paper_bits_are_those_of_the_decomposition(decomposition):
    assert pack(decomposition, torch.float16).spec.paper_bits == decomposition.bits()


@given(st.integers(1, 40), st.integers(1, 200), st.integers(1, LARGEST_BITS), st.integers(1, 300), st.floats(0.5, 9))
def test_a_budget_in_true_bits_is_used_up(m, n, bits, group_size, per_weight):
    fitting = [k for k in range(1, n + 1) if 8 * coded_bytes((m, n), k, bits, group_size) <= per_weight * m * n]
    assert kept_within((m, n), per_weight, bits, group_size) == max(fitting, default=0)


@given(st.integers(1, 300), st.integers(1, LARGEST_BITS), st.data())
def test_signs_lie_where_they_take_less(n, bits, data):
    k = data.draw(st.integers(1, n))
    in_codes = -(-n // 5) + -(-k * (bits + 1) // 8)
    in_a_plane = 2 * -(-n // 8) + -(-k * bits // 8)
    assert signs_in_codes(n, k, bits) == (in_codes <= in_a_plane)


def test_true_size_of_three_bit_values():
    decomposition = on_a_grid(torch.randn(64, 640), kept=320, bits=3, group_size=128)
    # Two bitmaps, 320 codes of 3 bits, 5 scales and an offset in every row; the factors.
    assert pack(decomposition, torch.float16).nbytes == 64 * (2 * 80 + 120 + 2 * 6) + 2 * (64 + 640)


@pytest.mark.parametrize("kept", [10, 35])
def test_corrupted_planes_are_refused(kept):
    packed = pack(on_a_grid(torch.randn(6, 40), kept, bits=2, group_size=16), torch.float16)
    parts = packed.parts()
    plane = parts["states" if packed.spec.sign_in_code else "positions"]
    assert ("states" in parts) == (kept == 10)
    plane[4, 2] = 1 if plane[4, 2] == 0 else 0
    with pytest.raises(SlabError, match="layer: corrupted plane, row 4 keeps"):
        packed.spec.from_parts(parts, "layer")
