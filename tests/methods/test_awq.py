"""AWQ against all it could have chosen, tried one by one, and what scaling is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slablm.config import CompressionConfig
from slablm.methods import LayerStats
from slablm.methods.awq import ALPHAS, awq, group_blocks, input_scales
from slablm.methods.quantizers import rtn
from slablm.methods.uniform import CLIPS


def problem(m, n, seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (spread * (torch.rand(n, generator=generator) - 0.5))
    mixing = 0.5 * torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    inputs = torch.randn(3 * n + 5, n, generator=generator) @ mixing * sizes
    return torch.randn(m, n, generator=generator), inputs


def stats_of(inputs):
    return LayerStats(inputs.norm(dim=0), len(inputs), inputs[:0], inputs.T @ inputs)


def output_error(weight, approximation, inputs):
    """‖X (W − Ŵ)ᵀ‖²_F in float64."""
    return (inputs.double() @ (weight - approximation).double().T).square().sum().item()


def on_grid(row, clip, bits):
    """Some weights of a row on the grid of one clip, by the textbook: [g] float64."""
    top, low, high = 2**bits - 1, clip * min(0.0, row.min().item()), clip * max(0.0, row.max().item())
    scale = torch.tensor(max((high - low) / top, 2.0**-24)).half().double()
    zero = (-low / scale).round().clamp(0, top)
    return scale * (((row / scale).round() + zero).clamp(0, top) - zero)


def brute_force(weight, inputs, bits, group_size):
    """Ŵ of every α: s = d^α, then each group of each row with the clip whose part of the output is least wrong."""
    rms = inputs.double().square().mean(dim=0).sqrt()
    for alpha in ALPHAS:
        s = rms**alpha
        s = (s / (s.max() * s.min()).sqrt()).half().double()
        result = torch.zeros_like(weight, dtype=torch.float64)
        for i in range(len(weight)):
            for start in range(0, weight.shape[1], group_size):
                group = slice(start, start + group_size)
                row = weight[i, group].double()
                tried = [on_grid(row * s[group], clip, bits) / s[group] for clip in CLIPS]
                errors = [(inputs[:, group].double() @ (q - row)).square().sum().item() for q in tried]
                result[i, group] = tried[errors.index(min(errors))]
        yield result


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 24), st.sampled_from([2, 3, 4]), st.integers(0, 999))
def test_awq_is_the_best_of_all_it_could_choose(m, n, group_size, bits, seed):
    weight, inputs = problem(m, n, seed)
    result = awq(weight, stats_of(inputs), CompressionConfig(value_bits=bits, group_size=group_size))
    errors = [output_error(weight, q, inputs) for q in brute_force(weight, inputs, bits, group_size)]
    size = output_error(weight, 0 * weight, inputs)
    # Roundings of float32 can turn a tie of two clips; what they do to the other groups is small then.
    assert output_error(weight, result.dense(), inputs) == pytest.approx(min(errors), rel=0.02, abs=1e-6 * size)


def test_the_weight_is_what_the_codes_and_scales_say():
    weight, inputs = problem(3, 20, seed=0, spread=2)
    result = awq(weight, stats_of(inputs), CompressionConfig(value_bits=3, group_size=8))
    dense = result.dense()
    assert result.input_scales.shape == (20,)
    assert result.input_scales.dtype == torch.float16
    for i in range(3):
        for j in range(20):
            scale, zero = result.scales[i, j // 8].item(), result.zeros[i, j // 8].item()
            expected = scale * (result.codes[i, j].item() - zero) / result.input_scales[j].item()
            assert dense[i, j].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_scaling_helps_where_few_inputs_are_large(bits, seed):
    weight, inputs = problem(32, 128, seed, spread=0.2)
    inputs[:, ::40] *= 20
    config, stats = CompressionConfig(value_bits=bits), stats_of(inputs)
    found, plain = (output_error(weight, method(weight, stats, config).dense(), inputs) for method in (awq, rtn))
    assert found < 0.5 * plain  # measured: 0.27 to 0.36


def test_inputs_that_are_alike_are_not_scaled():
    weight, _ = problem(4, 24, seed=0)
    stats = LayerStats(torch.ones(24), 24, torch.empty(0, 24), torch.eye(24))
    config = CompressionConfig(value_bits=4, group_size=8)
    assert torch.equal(awq(weight, stats, config).dense(), rtn(weight, stats, config).dense())


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_size_of_the_gram_matrix_means_nothing(size):
    weight, inputs = problem(4, 24, seed=1)
    stats, config = stats_of(inputs), CompressionConfig(value_bits=3, group_size=8)
    other = LayerStats(stats.input_norms, 1, stats.sample, stats.gram * size)
    first, second = (output_error(weight, awq(weight, s, config).dense(), inputs) for s in (stats, other))
    assert first == pytest.approx(second, rel=0.02)


def test_scales_are_powers_around_one():
    norms = torch.tensor([1.0, 4.0, 16.0])
    assert input_scales(norms, 0.0).tolist() == [1, 1, 1]
    assert input_scales(norms, 0.5).tolist() == [0.5, 1, 2]
    assert input_scales(norms, 1.0).tolist() == [0.25, 1, 4]
    assert torch.isfinite(input_scales(torch.tensor([1e-15, 1.0, 1e15]), 1.0)).all()


def test_a_dead_input_gets_a_scale_too():
    weight, inputs = problem(3, 16, seed=2)
    inputs[:, 4] = 0
    result = awq(weight, stats_of(inputs), CompressionConfig(group_size=16))
    assert torch.isfinite(result.dense()).all()
    assert (result.input_scales > 0).all()


def test_blocks_of_a_gram_matrix():
    blocks = group_blocks(torch.arange(9.0).view(3, 3), 2)
    assert blocks.tolist() == [[[0, 1], [3, 4]], [[8, 0], [0, 0]]]
