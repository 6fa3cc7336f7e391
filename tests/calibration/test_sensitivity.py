import pytest
import torch
from torch import nn

from slablm.calibration.sensitivity import sensitivities


class Residual(nn.Module):
    """Hidden states plus two layers in a row; a third one that nothing reads, and a fourth that is never run."""

    def __init__(self, first=8, hidden=6):
        super().__init__()
        self.a, self.b = nn.Linear(hidden, first), nn.Linear(first, hidden)
        self.unused, self.idle = nn.Linear(hidden, 4), nn.Linear(hidden, 4)

    def forward(self, states):
        self.unused(states)
        return states + self.b(torch.tanh(self.a(states)))

    def layers(self):
        return {name: getattr(self, name) for name in ("a", "b", "unused", "idle")}


def probes(count=40, tokens=50):
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(count, 1, tokens, 1, generator=generator) * 5
    return list(torch.randn(count, 1, tokens, 6, generator=generator) * scales)


def slow(block, hidden):
    """The Jacobians themselves, token by token."""
    sums = {"a": 0.0, "b": 0.0}
    tokens = 0
    for window in hidden:
        for token in window[0]:
            before = block.a(token)
            size = (token + block.b(torch.tanh(before))).norm()
            to_b = torch.eye(6) / size
            to_a = to_b @ block.b.weight @ torch.diag(1 - torch.tanh(before) ** 2)
            sums["b"] += to_b.square().sum().item() / 6
            sums["a"] += to_a.square().sum().item() / 8
            tokens += 1
    return {name: value / tokens for name, value in sums.items()}


@torch.no_grad()
def test_the_mean_squared_relative_change():
    torch.manual_seed(0)
    block, hidden = Residual(), probes()
    result = sensitivities(block.layers(), block, hidden, seed=0)
    expected = slow(block, hidden)
    assert result.keys() == {"a", "b"}
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=0.1)


@torch.no_grad()
def test_nothing_is_left_behind():
    block, hidden = Residual(), probes(2)
    before = [states.clone() for states in hidden]
    first, second = (sensitivities(block.layers(), block, hidden, seed=3) for _ in range(2))
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(before, hidden, strict=True))
    assert all(parameter.grad is None for parameter in block.parameters())
    assert not any(layer._forward_hooks for layer in block.layers().values())
    assert not block(hidden[0]).requires_grad


@torch.no_grad()
def test_layers_that_are_not_reached_are_left_out():
    block, hidden = Residual(), probes(2)
    assert sensitivities({"away": torch.nn.Linear(6, 6)}, block, hidden, seed=0) == {}
    assert sensitivities({"away": torch.nn.Linear(6, 6)} | block.layers(), block, hidden, seed=0).keys() == {"a", "b"}
