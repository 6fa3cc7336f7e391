import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.methods.alphabet import level_count
from slablm.methods.alphabet_fit import _start, fit_alphabet, fitted_background, fitted_levels, fitted_scales

SHAPES = st.tuples(st.integers(1, 8), st.integers(1, 24))
UPDATES = [fitted_levels, fitted_scales, fitted_background]


def problem(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator) * torch.rand(m, 1, generator=generator)
    return weight, torch.rand(n, generator=generator).square() * 10 + 0.01


def error(sizes, importance, codes, alphabet):
    """Σ d² (|W| − m)², entry by entry."""
    total = 0.0
    for i in range(len(sizes)):
        for j, size in enumerate(sizes[i].tolist()):
            c = int(codes[i, j])
            scale = alphabet.scales[i, j // alphabet.group_size].item()
            value = scale * alphabet.levels[c - 1].item() if c else (alphabet.left[i] * alphabet.right[j]).item()
            total += importance[j].item() * (size - value) ** 2
    return total


@given(SHAPES, st.integers(2, 5), st.integers(1, 9), st.integers(0, 1000))
def test_no_part_of_a_round_raises_the_error(shape, bits, group_size, seed):
    weight, importance = problem(*shape, seed)
    sizes = weight.abs()
    alphabet, codes = _start(sizes, bits, group_size)
    before = error(sizes, importance, codes, alphabet)
    for _ in range(3):
        for update in UPDATES:
            alphabet = update(sizes, importance, codes, alphabet)
            after = error(sizes, importance, codes, alphabet)
            assert after <= before * (1 + 1e-5) + 1e-9
            before = after
        assert (alphabet.levels.diff() >= -1e-6).all()
        codes = alphabet.nearest(sizes)
        assert error(sizes, importance, codes, alphabet) <= before * (1 + 1e-5) + 1e-9
        before = error(sizes, importance, codes, alphabet)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_part_is_the_least_squares_solution(bits):
    """Moving any number of the part that was fitted, either way, only makes it worse."""
    weight, importance = problem(4, 12, bits)
    sizes, group_size = weight.abs(), 5
    for update, name in zip(UPDATES, ("levels", "scales", "right"), strict=True):
        alphabet, codes = _start(sizes, bits, group_size)
        alphabet = update(sizes, importance, codes, alphabet)
        best = error(sizes, importance, codes, alphabet)
        part = getattr(alphabet, name)
        for index in range(part.numel()):
            before = part.view(-1)[index].item()
            for factor in (0.98, 1.02):
                part.view(-1)[index] = before * factor
                assert error(sizes, importance, codes, alphabet) >= best * (1 - 1e-6)
            part.view(-1)[index] = before


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_weights_that_lie_on_an_alphabet_are_found_exactly(bits):
    """Each magnitude lies in a cell of its own of the first cuts, about as often as if weights were normal."""
    generator = torch.Generator().manual_seed(bits)
    count = level_count(bits)
    cells = torch.arange(count + 2) / (count + 1)
    levels = 6**0.5 * torch.erfinv((cells[1:] + cells[:-1]) / 2)
    mass = torch.erf(3**0.5 * torch.erfinv(cells)).diff()
    codes = torch.arange(count + 1).repeat_interleave((256 * mass).round().long().clamp_min(1))
    codes = torch.cat([codes, codes])
    scales = torch.rand(3, 2, generator=generator) * 0.3 + 0.9
    weight = scales.repeat_interleave(len(codes) // 2, dim=1) * levels[codes]
    weight = torch.where(codes == 0, scales.mean(dim=1, keepdim=True) * levels[0], weight)
    alphabet = fit_alphabet(weight, torch.ones(len(codes)), bits, len(codes) // 2)
    torch.testing.assert_close(alphabet.magnitudes(alphabet.nearest(weight)), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)])
def test_normal_weights_get_nearly_the_distortion_of_lloyd_and_max(bits, distortion):
    """Max (1960), table I: mean squared error of 2ᵖ levels for a normal density. Scales per group save a little."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    alphabet = fit_alphabet(weight, torch.ones(512), bits, 128)
    found = (alphabet.magnitudes(alphabet.nearest(weight.abs())) - weight.abs()).square().mean().item()
    assert 0.85 * distortion < found < 1.02 * distortion


def test_important_columns_are_fitted_better():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(64)
    importance[:8] = 1000

    def lost(d):
        alphabet = fit_alphabet(weight, d, 3, 64)
        return (alphabet.magnitudes(alphabet.nearest(weight.abs())) - weight.abs())[:, :8].square().mean()

    assert lost(importance) < 0.75 * lost(torch.ones(64))


@pytest.mark.parametrize("scale", [2.0**-40, 1.0, 2.0**60])
def test_importance_counts_up_to_a_factor(scale):
    weight, importance = problem(6, 20, 0)
    expected, found = (fit_alphabet(weight, d, 3, 8) for d in (importance, importance * scale))
    assert torch.equal(found.levels, expected.levels)
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("bits", [2, 5])
def test_rows_and_groups_of_zeros(bits):
    weight, importance = problem(4, 12, 0)
    weight[1] = 0
    weight[2, 4:8] = 0
    alphabet = fit_alphabet(weight, importance, bits, 4)
    found = alphabet.magnitudes(alphabet.nearest(weight.abs()))
    assert torch.equal(found[1], torch.zeros(12))
    assert torch.equal(found[2, 4:8], torch.zeros(4))
    zero = fit_alphabet(torch.zeros(3, 5), torch.ones(5), bits, 4)
    assert torch.equal(zero.magnitudes(zero.nearest(torch.zeros(3, 5))), torch.zeros(3, 5))
