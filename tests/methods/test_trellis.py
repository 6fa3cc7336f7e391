import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.methods.symbols import TILE_ROWS, level_values, signs
from slablm.methods.trellis import nearest_codes, plain_trellis_columns, trellis_columns
from tests.methods.blocks import blocks, check_settled, random_block, smallest_distances

# Whole tiles, and such as lack rows.
few_rows = st.integers(1, 2 * TILE_ROWS)
seeds = st.integers(0, 1000)


@given(blocks)
def test_every_tile_gets_its_nearest_values(arguments):
    before = [part if part is None else part.clone() for part in arguments]
    check_settled(arguments, *trellis_columns(*arguments))
    assert all(a is b or torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@given(m=few_rows, bits=st.integers(2, 3), seed=seeds)
def test_no_symbols_of_a_tile_are_nearer(m, bits, seed):
    targets, scales, levels = column(m, bits, seed)
    codes, values = nearest_codes(targets, scales, levels)
    assert torch.equal(values, decoded(codes, scales, levels))
    for rows in torch.arange(m).split(TILE_ROWS):
        symbols = torch.tensor(list(itertools.product(range(2**bits), repeat=len(rows))), dtype=torch.uint8).T
        tile = decoded(symbols, scales[rows], levels)
        smallest = (tile - targets[rows, None]).double().square().sum(dim=0).amin()
        found = (values - targets)[rows].double().square().sum()
        assert found <= smallest + 1e-5
        # The tests of other implementations rely on this.
        [[known]] = smallest_distances(targets[None, rows], scales[rows], levels)
        assert known == pytest.approx(smallest.item(), abs=1e-5)


@given(m=few_rows, bits=st.integers(2, 6), seed=seeds)
def test_values_that_symbols_stand_for_are_found(m, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (m,), generator=generator, dtype=torch.uint8)
    _, scales, levels = column(m, bits, seed)
    targets = decoded(codes, scales, levels)
    assert torch.equal(nearest_codes(targets, scales, levels)[1], targets)


def test_tiles_do_not_depend_on_each_other():
    targets, scales, levels = column(3 * TILE_ROWS + 2, 3, 0)
    whole = nearest_codes(targets, scales, levels)[0]
    parts = zip(targets.split(TILE_ROWS), scales.split(TILE_ROWS), strict=True)
    assert torch.equal(torch.cat([nearest_codes(*part, levels)[0] for part in parts]), whole)


def test_above_a_row_alone_is_an_even_symbol():
    """The rows that its tile lacks have symbols 0. Its own may be odd: there is no value below it."""
    levels = torch.tensor([-1.0, 2.0, 3.0, 4.0])
    for target, code in {4.0: 3, -4.0: 0}.items():
        codes, values = nearest_codes(torch.tensor([target]), torch.ones(1), levels)
        assert (codes.item(), values.item()) == (code, levels[code])


def test_the_sign_of_the_first_row_comes_from_the_last():
    """Which takes the farther of its two symbols for it."""
    levels = torch.tensor([1.0, 2.0, 10.0, 20.0])
    codes, values = nearest_codes(torch.tensor([-10.0, 10.0, 10.0, 1.4]), torch.ones(4), levels)
    assert codes.tolist() == [2, 2, 2, 1]
    assert values.tolist() == [-10.0, 10.0, 10.0, 2.0]


def test_of_two_levels_that_are_equally_near_it_is_the_lower():
    levels = torch.tensor([1.0, 50.0, 3.0, 60.0])
    codes, values = nearest_codes(torch.full((4,), 2.0), torch.ones(4), levels)
    assert codes.tolist() == [0] * 4
    assert values.tolist() == [1.0] * 4


def test_of_ways_that_are_equally_near_the_even_one():
    """With scales of 0 all are."""
    levels = level_values(torch.tensor([-100, -50, 20, 90], dtype=torch.int8))
    codes, values = nearest_codes(torch.tensor([1.0, -1.0, 0.5, 0.0, 1.0]), torch.zeros(5), levels)
    assert (codes % 2 == 0).all()
    assert (values == 0).all()


@pytest.mark.parametrize("apart", [False, True])
def test_errors_are_fed_forward(apart):
    """Two columns, as the formulas say."""
    current, before, coefficients, divisors, scales, levels = random_block(2, 9, 3, apart=apart)
    codes, columns, errors = plain_trellis_columns(current, before, coefficients, divisors, scales, levels)
    first = nearest_codes(current[0], scales, levels)
    moved = current[1] - coefficients[0, 1] * errors[0]
    second = nearest_codes(moved, scales, levels)
    assert torch.equal(codes, torch.stack([first[0], second[0]]))
    assert torch.equal(columns, torch.stack([first[1], second[1]]))
    base = before if apart else torch.stack([current[0], moved])
    torch.testing.assert_close(errors, (base - columns) / divisors[:, None])


def column(m, bits, seed):
    """Targets, scales and levels."""
    current, _, _, _, scales, levels = random_block(1, m, bits, apart=False, seed=seed)
    return current[0], scales, levels


def decoded(codes, scales, levels):
    """τ s a of symbols [m] or [m, columns]."""
    values = signs(codes.view(len(codes), -1)) * scales[:, None] * levels[codes.view(len(codes), -1).long()]
    return values.view(codes.shape)
