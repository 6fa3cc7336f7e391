import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm import SlabError
from slablm.methods.grid import CLIPS, OFFSETS, ValueGrid, fit_grid


def random_case(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, norms = torch.randn(m, n, generator=generator), torch.rand(n, generator=generator) + 0.1
    return weight, torch.rand(m, n, generator=generator) < 0.6, norms


def slow_error(row, mask, norms, grid, index):
    """The definition, entry by entry."""
    scales, offset = grid.scales[index].tolist(), grid.offsets[index].item()
    total = 0.0
    for j, weight in enumerate(row.tolist()):
        if mask[j]:
            scale = scales[j // grid.group_size]
            distance = min(abs(scale * (offset + c) - abs(weight)) for c in range(2**grid.bits))
            total += (norms[j].item() * distance) ** 2
    return total


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 5), st.integers(1, 16), st.integers(0, 2**31))
def test_every_row_has_the_best_grid_of_the_search(m, n, bits, group_size, seed):
    weight, mask, norms = random_case(m, n, seed)
    fitted = fit_grid(weight, mask, norms, bits, group_size)
    for i in range(m):
        errors = []
        for offset in OFFSETS:
            total = 0.0
            for start in range(0, n, group_size):
                columns = slice(start, start + group_size)
                magnitudes = (weight[i, columns].abs() * mask[i, columns])[None]
                groups = []
                for clip in CLIPS:
                    scale = max((clip * magnitudes.max() / (offset + 2**bits - 1)).item(), 2.0**-14)
                    one = ValueGrid(torch.tensor([[scale]]).half(), torch.tensor([offset]).half(), bits, group_size)
                    groups.append(slow_error(magnitudes[0], mask[i, columns], norms[columns], one, 0))
                total += min(groups)
            errors.append(total)
        assert slow_error(weight[i], mask[i], norms, fitted, i) == pytest.approx(min(errors), rel=1e-4, abs=1e-9)


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 8), st.integers(1, 16), st.integers(0, 2**31))
def test_codes_and_magnitudes_are_inverse_on_the_grid(m, n, bits, group_size, seed):
    weight, mask, norms = random_case(m, n, seed)
    grid = fit_grid(weight, mask, norms, bits, group_size)
    columns = torch.arange(n)
    codes = torch.randint(0, 2**bits, (m, n), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(grid.codes(grid.magnitudes(codes, columns), columns), codes)
    some = torch.randint(0, n, (m, 3), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(
        grid.nearest(weight.abs().gather(1, some), some), grid.nearest(weight.abs(), columns).gather(1, some)
    )


def test_more_bits_are_nearer():
    weight, mask, norms = random_case(30, 200, 0)
    errors = []
    for bits in (1, 2, 3, 4, 6, 8):
        grid = fit_grid(weight, mask, norms, bits, 64)
        difference = (grid.nearest(weight.abs(), torch.arange(200)) - weight.abs()) * mask
        errors.append(difference.norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[0]


def test_what_does_not_fit_into_a_scale_is_an_error():
    with pytest.raises(SlabError, match="does not fit into an FP16 scale"):
        fit_grid(torch.full((1, 4), 1e6), torch.ones(1, 4, dtype=torch.bool), torch.ones(4), 3, 4)


def test_size():
    grid = fit_grid(torch.randn(5, 100), torch.ones(5, 100, dtype=torch.bool), torch.ones(100), 3, 32)
    assert grid.true_bits() == 16 * (5 * 4 + 5)
