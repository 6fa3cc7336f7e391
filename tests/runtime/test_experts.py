"""Experts apart compute what transformers' own do, whatever the layout, and run only where tokens are sent."""

import copy

import pytest
import torch
from torch import nn

from slablm.runtime.experts import Experts, all_experts, all_tokens, separate_experts, shares_of
from tests.compression.mixtures import FAMILIES, tiny

TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def apart(model):
    separate_experts(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_logits_are_those_of_transformers(family):
    model = tiny(family)
    expected = model(TOKENS).logits
    without = [fused for fused in model.modules() if shares_of(fused)]
    for fused in without:
        fused.down_proj.data.mul_(2)
    assert (model(TOKENS).logits - expected).norm() > 0.1 * expected.norm()  # else the rest would test nothing
    for fused in without:
        fused.down_proj.data.div_(2)
    apart(model)
    assert len(list(all_experts(model))) == len(without)
    torch.testing.assert_close(model(TOKENS).logits, expected)
    chosen = []
    with all_tokens(model, lambda experts, index: chosen.append(index)):
        torch.testing.assert_close(model(TOKENS).logits, expected)
    assert [index.shape for index in chosen] == [(48, 2)] * len(without)
    assert all(experts.note is None for _, experts in all_experts(model))


def test_experts_without_a_gate():
    class Fused(nn.Module):
        has_gate, has_bias, is_transposed, is_concatenated, num_experts = False, False, False, True, 3

        def __init__(self):
            super().__init__()
            self.up_proj, self.down_proj = (nn.Parameter(torch.randn(3, *shape)) for shape in ((6, 4), (4, 6)))
            self.act_fn = nn.ReLU()

    fused = Fused()
    up, down = fused.up_proj.detach(), fused.down_proj.detach()
    states, chosen, weights = torch.randn(5, 4), torch.tensor([[0], [2], [2], [0], [0]]), torch.rand(5, 1)
    expected = [
        weight * (down[number] @ (up[number] @ state).relu())
        for state, (number,), weight in zip(states, chosen.tolist(), weights, strict=True)
    ]
    torch.testing.assert_close(Experts.of(fused)(states, chosen, weights).detach(), torch.stack(expected))


@pytest.mark.parametrize("change", ["a norm", "a buffer", "no flags"])
def test_experts_that_hold_more_than_projections_are_left_alone(change):
    model = tiny("mixtral")
    fused = model.model.layers[0].mlp.experts
    if change == "a norm":
        fused.norm = nn.LayerNorm(4)
    elif change == "a buffer":
        fused.register_buffer("scale", torch.ones(4))
    else:
        del fused.is_transposed
    apart(model)
    assert [name for name, _ in all_experts(model)] == ["model.layers.1.mlp.experts"]
    assert model.model.layers[0].mlp.experts is fused


@torch.no_grad()
def test_only_chosen_experts_run():
    experts = apart(tiny("mixtral")).model.layers[0].mlp.experts
    ran = []
    for number in range(4):
        expert = experts.get_submodule(str(number))
        expert.down_proj.register_forward_hook(lambda module, args, out, n=number: ran.append((n, len(args[0]))))
    states = torch.randn(3, 64)
    experts(states, torch.tensor([[1, 3], [1, 0], [3, 1]]), torch.rand(3, 2))
    assert ran == [(0, 1), (1, 3), (3, 2)]


def test_gradients_reach_inputs_and_router():
    experts = apart(tiny("gpt_oss")).model.layers[0].mlp.experts.double()
    states = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[0, 1], [2, 0], [3, 1], [0, 3]])
    assert torch.autograd.gradcheck(lambda states, weights: experts(states, chosen, weights), (states, weights))


@torch.no_grad()
def test_copies_are_independent():
    model = apart(tiny("mixtral"))
    other = copy.deepcopy(model)
    expected = model(TOKENS).logits
    for parameter in other.parameters():
        parameter.zero_()
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=0)


def test_tensors_own_their_memory():
    """Views of one tensor would be taken for tied ones, and saved as one."""
    model = apart(tiny("gpt_oss"))
    storages = [parameter.untyped_storage().data_ptr() for parameter in model.model.layers[0].mlp.experts.parameters()]
    assert len(set(storages)) == len(storages)


def test_without_values_tokens_are_spread_evenly():
    experts = apart(tiny("qwen3_moe")).model.layers[0].mlp.experts.to("meta")
    chosen = torch.zeros(5, 2, dtype=torch.long, device="meta")
    assert experts._counts(chosen) == [2, 3, 2, 3]
    assert experts(torch.empty(5, 64, device="meta"), chosen, torch.empty(5, 2, device="meta")).shape == (5, 64)
