from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.errors import SlabError
from slablm.methods.alphabet import MOST_STEPS, Alphabet, SymbolWeight, grid_steps, level_count, on_grid, written
from slablm.methods.rotation import Rotation

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 20))


def random_alphabet(m, n, bits, group_size, seed, zeros=0.0):
    generator = torch.Generator().manual_seed(seed)

    def positive(*shape):
        values = torch.rand(shape, generator=generator) + 0.01
        return values * (torch.rand(shape, generator=generator) >= zeros)

    levels = positive(level_count(bits)).sort().values
    return Alphabet(positive(m), positive(n), positive(m, -(-n // group_size)), levels, group_size)


def random_symbols(m, n, bits, group_size, seed, rotation=None):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(level_count(bits) + 1, (m, n), generator=generator, dtype=torch.uint8)
    minus = torch.rand(m, n, generator=generator) < 0.5
    return written(codes, minus, random_alphabet(m, n, bits, group_size, seed).stored(), rotation)


def magnitude(alphabet, i, j, code):
    """|Ŵ_ij| by the definition, in Python's floats."""
    if code == 0:
        return alphabet.left[i].item() * alphabet.right[j].item()
    return alphabet.scales[i, j // alphabet.group_size].item() * alphabet.levels[code - 1].item()


@given(SHAPES, st.integers(2, 5), st.integers(1, 9), st.integers(0, 1000))
def test_dense_is_the_definition_to_the_last_bit(shape, bits, group_size, seed):
    weight = random_symbols(*shape, bits, group_size, seed)
    dense = weight.dense()
    for i in range(shape[0]):
        for j in range(shape[1]):
            sign = -1 if weight.signs[i, j] else 1
            # Products of two FP16 numbers: a double holds them exactly, and so does a float32.
            assert dense[i, j].item() == sign * magnitude(weight.alphabet, i, j, weight.codes[i, j].item())


@given(SHAPES, st.integers(2, 5), st.integers(1, 9), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 1.0]))
def test_nearest_is_the_nearest_of_all(shape, bits, group_size, seed, zeros):
    alphabet = random_alphabet(*shape, bits, group_size, seed, zeros)
    sizes = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1))
    codes = alphabet.nearest(sizes)
    found = (alphabet.magnitudes(codes) - sizes).abs()
    for i in range(shape[0]):
        for j in range(shape[1]):
            distances = [abs(magnitude(alphabet, i, j, c) - sizes[i, j].item()) for c in range(level_count(bits) + 1)]
            assert found[i, j].item() == pytest.approx(min(distances), abs=1e-6)


@given(SHAPES, st.integers(2, 5), st.integers(1, 9), st.integers(0, 1000))
def test_a_magnitude_is_nearest_to_itself(shape, bits, group_size, seed):
    """Codes are found again from a dense weight."""
    weight = random_symbols(*shape, bits, group_size, seed)
    found = weight.alphabet.nearest(weight.dense().abs())
    assert torch.equal(weight.alphabet.magnitudes(found), weight.alphabet.magnitudes(weight.codes))


@pytest.mark.parametrize("factor", [1.0, 1e-5, 1e5])
def test_stored_numbers_are_fp16_and_change_little(factor):
    alphabet = random_alphabet(5, 12, 4, 4, 0)
    alphabet = replace(alphabet, left=alphabet.left * factor, scales=alphabet.scales * factor)
    stored = alphabet.stored()
    for part in (stored.left, stored.right, stored.scales, stored.levels):
        assert torch.equal(part, part.half().float())
    for code in (0, 3):
        codes = torch.full((5, 12), code)
        torch.testing.assert_close(stored.magnitudes(codes), alphabet.magnitudes(codes), rtol=2e-3, atol=0)
    assert torch.equal(stored.magnitudes(codes), stored.stored().magnitudes(codes))


def test_stored_levels_ascend_although_the_last_bit_of_float32_does_not():
    alphabet = random_alphabet(1, 4, 3, 4, 0)
    half = torch.tensor(1 + 2**-11)  # in the middle between two FP16 numbers
    levels = torch.stack([half, half + 2**-22, half - 2**-22])
    assert (replace(alphabet, levels=levels).stored().levels.diff() >= 0).all()


def test_nothing_but_zeros_is_stored():
    zeros = Alphabet(torch.zeros(2), torch.ones(3), torch.zeros(2, 1), torch.ones(1), 128).stored()
    assert torch.equal(zeros.right, torch.ones(3))  # not divided away
    assert torch.equal(zeros.magnitudes(torch.tensor([[0, 1, 1]] * 2)), torch.zeros(2, 3))


@pytest.mark.parametrize("part", ["left", "scales"])
@pytest.mark.parametrize("bad", [1e38, float("inf"), float("nan")])
def test_what_does_not_fit_into_fp16_is_refused(part, bad):
    alphabet = random_alphabet(3, 4, 2, 4, 0)
    tensor = getattr(alphabet, part).clone()
    tensor[0] = bad
    with pytest.raises(SlabError, match="does not fit into FP16.*ignore this layer"):
        replace(alphabet, **{part: tensor}).stored()


@pytest.mark.parametrize(("bits", "levels"), [(2, 1), (3, 3), (4, 7), (5, 15)])
def test_symbols_and_true_bits(bits, levels):
    weight = random_symbols(6, 300, bits, 128, 0)
    assert level_count(bits) == levels == len(weight.alphabet.levels)
    assert weight.symbol_bits == bits
    assert weight.true_bits() == weight.bits() == bits * 6 * 300 + 16 * (6 * 3 + 6 + 300 + levels)
    symbols = weight.symbols()
    assert int(symbols.max()) < 2**bits
    assert torch.equal(symbols & levels, weight.codes)
    assert torch.equal(symbols >> (bits - 1) == 1, weight.signs)


def test_a_rotation_costs_its_seed_and_block():
    rotation = Rotation(16, 16, 5)
    weight, plain = random_symbols(3, 16, 4, 8, 0, rotation), random_symbols(3, 16, 4, 8, 0)
    assert weight.true_bits() == plain.true_bits() + 72
    assert torch.equal(weight.rotated_dense(), plain.dense())
    torch.testing.assert_close(rotation.rotate(weight.dense()), plain.dense())


def test_bits_per_weight_of_a_real_shape():
    weight = random_symbols(576, 1536, 4, 128, 0)
    assert weight.true_bits() / (576 * 1536) == pytest.approx(4 + 16 / 128 + 16 * (576 + 1536 + 7) / (576 * 1536))


def broken(weight, **changes):
    alphabet = {name: changes.pop(name) for name in ("left", "scales", "levels", "group_size") if name in changes}
    return replace(weight, alphabet=replace(weight.alphabet, **alphabet), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(3, 5, dtype=torch.uint8)}, "different shapes"),
        ({"signs": torch.zeros(3, 5, dtype=torch.bool)}, "different shapes"),
        ({"group_size": 3}, "one scale per row and group"),
        ({"levels": torch.ones(2, dtype=torch.float16)}, "2 levels do not fill symbols"),
        ({"levels": torch.ones(0, dtype=torch.float16)}, "0 levels do not fill symbols"),
        ({"codes": torch.full((3, 8), 4, dtype=torch.uint8)}, "no larger than the number of levels"),
        ({"codes": torch.zeros(3, 8, dtype=torch.int64)}, "must be uint8"),
        ({"left": -torch.ones(3, dtype=torch.float16)}, "non-negative float16"),
        ({"left": torch.full((3,), torch.nan, dtype=torch.float16)}, "finite"),
        ({"scales": torch.ones(3, 2)}, "float16"),
        ({"levels": torch.tensor([1, 3, 2], dtype=torch.float16)}, "ascend"),
        ({"rotation": Rotation(16, 8, 0)}, "rotation of 16 inputs does not fit a weight with 8"),
    ],
)
def test_what_is_not_in_the_form_is_refused(changes, message):
    weight = random_symbols(3, 8, 3, 4, 0)
    assert isinstance(weight, SymbolWeight)
    with pytest.raises(ValueError, match=message):
        broken(weight, **changes)


def random_levels(bits, seed):
    return torch.rand(level_count(bits), generator=torch.Generator().manual_seed(seed)).sort().values


@given(st.integers(2, 5), st.integers(0, 1000), st.floats(-4, 4))
def test_stored_levels_lie_on_the_grid_that_is_told(bits, seed, exponent):
    """What kernels make of them, the nearest step, is what was written but for FP16."""
    alphabet = replace(random_alphabet(3, 8, bits, 4, seed), levels=random_levels(bits, seed) * 10**exponent)
    levels = alphabet.stored().levels
    steps = grid_steps(levels.half())
    assert steps is not None
    assert 1 <= steps <= MOST_STEPS
    places = (levels / levels[-1] * steps).round()
    torch.testing.assert_close(places / steps * levels[-1], levels, rtol=2**-10, atol=0)


@given(st.integers(2, 5), st.integers(0, 1000))
def test_levels_move_less_than_half_a_step_of_any_grid(bits, seed):
    levels = random_levels(bits, seed)
    moved = on_grid(levels)
    assert moved[-1] == levels[-1]
    assert (moved.diff() >= 0).all()
    # Of all grids the best: no worse than the finest alone.
    finest = (levels / levels[-1] * MOST_STEPS).round() / MOST_STEPS * levels[-1]
    assert (moved - levels).norm() <= (finest - levels).norm() * (1 + 1e-5) + 1e-7


@given(st.integers(2, 5), st.integers(0, 1000))
def test_what_lies_on_a_grid_stays(bits, seed):
    moved = on_grid(random_levels(bits, seed))
    torch.testing.assert_close(on_grid(moved), moved, rtol=1e-6, atol=1e-7)
    # Rounded to FP16 another grid may be the nearest, by less than the rounding.
    stored = random_alphabet(3, 8, bits, 4, seed).stored()
    torch.testing.assert_close(stored.stored().levels, stored.levels, rtol=2**-10, atol=0)


def test_levels_between_the_steps_of_all_grids_lie_on_none():
    for places in ([0.5, 1, 127], [1, 50.5, 127], [3, 64.4, 126.7], [0.01, 0.02, 127]):
        assert grid_steps(torch.tensor(places).half()) is None
    assert grid_steps(torch.tensor([1.0, 2.0, 127.0]).half()) == 127
    assert grid_steps(torch.tensor([0.0, 2.0, 6.0]).half()) == 3  # the coarsest


@pytest.mark.parametrize("level", [1.0, 0.1, 6e-8, 65504.0])
def test_one_level_is_on_a_grid_of_one_step(level):
    levels = torch.tensor([level])
    assert torch.equal(on_grid(levels), levels)
    assert grid_steps(levels.half()) == 1


def test_levels_of_nothing_are_on_no_grid():
    levels = torch.zeros(3)
    assert torch.equal(on_grid(levels), levels)
    assert grid_steps(levels.half()) is None
