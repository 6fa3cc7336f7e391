from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.methods.rotation import Rotation
from slablm.methods.symbols import SymbolWeight, level_values, on_grid

SHAPES = st.tuples(st.integers(1, 10), st.integers(1, 20))


def random_symbols(m, n, bits, seed=0, block=1):
    """A weight in symbols whose numbers are random; a block above 1 gives it a rotation."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (m, n), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(m, generator=generator) * (torch.rand(m, generator=generator) > 0.1)).half()
    levels = torch.randint(-128, 128, (2**bits,), generator=generator, dtype=torch.int8)
    return SymbolWeight(codes, scales, levels, Rotation(n, block, seed) if block > 1 else None)


def value(weight, i, j):
    """Ŵ_ij by the definition, in Python's floats."""
    first, rows = i - i % 4, weight.shape[0]
    above = first + (i - 1) % 4
    odd = above < rows and weight.codes[above, j].item() % 2 == 1
    level = (weight.levels[weight.codes[i, j].item()].item() + 0.5) / 128
    return (-1 if odd else 1) * weight.scales[i].item() * level


@given(SHAPES, st.integers(2, 6), st.integers(0, 1000))
def test_dense_is_the_definition_to_the_last_bit(shape, bits, seed):
    weight = random_symbols(*shape, bits, seed)
    dense = weight.dense()
    for i in range(shape[0]):
        for j in range(shape[1]):
            # 11 significant bits times 8: a double holds the product exactly, and so does a float32.
            assert dense[i, j].item() == value(weight, i, j)


def test_the_symbols_of_a_tile_are_a_cycle():
    """An odd symbol turns the sign in the row below it, that of the fourth row the first's, and no other tile's."""
    for odd in range(4):
        codes = torch.zeros(8, 1, dtype=torch.uint8)
        codes[odd] = 3
        weight = SymbolWeight(codes, torch.ones(8).half(), torch.tensor([10, 20, 30, 10]).to(torch.int8))
        minus = (weight.dense()[:, 0] < 0).nonzero()[:, 0].tolist()
        assert minus == [(odd + 1) % 4]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_bits_and_true_bits(bits):
    weight = random_symbols(6, 300, bits)
    assert weight.symbol_bits == bits
    assert weight.true_bits() == weight.bits() == bits * 6 * 300 + 16 * 6 + 8 * 2**bits


def test_a_rotation_costs_its_seed_and_block():
    weight, plain = random_symbols(3, 16, 4, block=16), random_symbols(3, 16, 4)
    assert weight.true_bits() == plain.true_bits() + 72
    assert torch.equal(weight.rotated_dense(), plain.dense())
    torch.testing.assert_close(weight.rotation.rotate(weight.dense()), plain.dense())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": torch.ones(4).half()}, "one scale per row"),
        ({"scales": torch.ones(3, 1).half()}, "one scale per row"),
        ({"scales": -torch.ones(3).half()}, "non-negative float16"),
        ({"scales": torch.full((3,), torch.nan).half()}, "finite"),
        ({"scales": torch.ones(3)}, "float16"),
        ({"levels": torch.ones(6, dtype=torch.int8)}, "6 levels do not fill symbols"),
        ({"levels": torch.ones(128, dtype=torch.int8)}, "128 levels do not fill symbols"),
        ({"levels": torch.ones(8)}, "levels must be int8"),
        ({"codes": torch.full((3, 8), 8, dtype=torch.uint8)}, "lower than the number of levels"),
        ({"codes": torch.zeros(3, 8, dtype=torch.int64)}, "must be uint8"),
        ({"rotation": Rotation(16, 8, 0)}, "rotation of 16 inputs does not fit a weight with 8"),
    ],
)
def test_what_is_not_in_the_form_is_refused(changes, message):
    weight = random_symbols(3, 8, 3)
    with pytest.raises(ValueError, match=message):
        replace(weight, **changes)


# Levels on the grid


def random_levels(bits, seed):
    return torch.randn(2**bits, generator=torch.Generator().manual_seed(seed)).sort().values


@given(st.integers(2, 6), st.integers(0, 1000), st.floats(-4, 4))
def test_levels_move_less_than_half_a_step_of_any_grid(bits, seed, exponent):
    levels = random_levels(bits, seed) * 10**exponent
    steps, factor = on_grid(levels)
    moved, largest = level_values(steps) * factor, levels.abs().max()
    assert (steps[1:] >= steps[:-1]).all()
    torch.testing.assert_close(moved.abs().max(), largest)
    # Of all grids the best: no worse than the finest alone, 255 half steps.
    finest = (2 * (levels / largest * 127.5).floor().clamp_max(127) + 1) / 255 * largest
    assert (moved - levels).norm() <= (finest - levels).norm() * (1 + 1e-4)


@given(st.integers(2, 6), st.integers(0, 1000))
def test_what_lies_on_a_grid_stays(bits, seed):
    steps, factor = on_grid(random_levels(bits, seed))
    again, _ = on_grid(level_values(steps) * factor)
    moved, moved_again = level_values(steps), level_values(again)
    torch.testing.assert_close(moved / moved.abs().max(), moved_again / moved_again.abs().max(), rtol=1e-5, atol=1e-6)


@given(st.integers(65, 127), st.integers(0, 1000))
def test_of_all_grids_it_is_the_one_that_levels_lie_on(largest, seed):
    levels = torch.randint(-largest - 1, largest + 1, (8,), generator=torch.Generator().manual_seed(seed))
    levels[seed % 8] = largest
    steps, factor = on_grid(0.37 * level_values(levels))
    torch.testing.assert_close(level_values(steps) * factor, 0.37 * level_values(levels))


def test_the_negative_of_a_level_is_on_the_grid():
    steps = torch.arange(-128, 128).to(torch.int8)
    assert torch.equal(level_values(~steps), -level_values(steps))
    assert level_values(steps)[[0, -1]].tolist() == [-255 / 256, 255 / 256]


def test_levels_of_nothing():
    steps, factor = on_grid(torch.zeros(4))
    assert factor == 0
    assert steps.dtype == torch.int8
