import pytest
import torch

from slablm.methods.trials import SAMPLED_ROWS, output_error, trial_rows
from tests.methods.problems import correlated


@pytest.mark.parametrize("m", [1, 63, 64, 65, 127, 4096])
def test_trials_look_at_random_rows(m):
    rows = trial_rows(m, seed=0)
    assert len(rows) == min(m, SAMPLED_ROWS)
    assert (rows.diff() > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < m
    assert torch.equal(rows, trial_rows(m, seed=0))
    assert (m <= SAMPLED_ROWS) == torch.equal(rows, trial_rows(m, seed=1))


@pytest.mark.parametrize("head_size", [32, 64, 128])
def test_trials_do_not_alias_with_attention_heads(head_size):
    """A stride over the rows of a q_proj found one pair of the rotary embedding in every head."""
    assert len((trial_rows(4096, seed=3) % head_size).unique()) > head_size / 4


def test_trials_leave_the_global_random_state_alone():
    state = torch.get_rng_state()
    trial_rows(4096, seed=3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_error_is_that_of_the_outputs(dtype):
    """Σ over tokens and outputs of ((W − Ŵ) x)², token by token."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 7, generator=generator)
    weight, approximation = torch.randn(2, 5, 7, generator=generator)
    expected = sum(((weight - approximation).double() @ x.double()).square().sum().item() for x in inputs)
    gram = (inputs.double().T @ inputs.double()).to(dtype)
    assert output_error(weight, approximation, gram) == pytest.approx(expected, rel=1e-5)


def test_rows_add_up():
    """What makes a sample of rows an honest one."""
    weight, gram, _ = correlated()
    approximation = weight.round()
    halves = sum(output_error(weight[i::2], approximation[i::2], gram) for i in (0, 1))
    assert output_error(weight, approximation, gram) == pytest.approx(halves, rel=1e-5)
