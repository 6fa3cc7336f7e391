import pytest
import torch
from torch import nn

from slablm import SlabError
from slablm.calibration.capture import capture_block_calls, collect_stats
from slablm.calibration.statistics import Use
from slablm.dense.targets import find_blocks
from slablm.runtime.experts import separate_experts
from slablm.system.distributed import ALONE
from tests.compression.mixtures import tiny


@torch.no_grad()
def test_block_calls_replay_the_model(tiny_model):
    windows = torch.randint(3, 200, (2, 16))
    _, blocks = find_blocks(tiny_model)
    hidden, calls = capture_block_calls(tiny_model, blocks, windows, torch.device("cpu"))
    assert [tuple(states.shape) for states in hidden] == [(1, 16, 64)] * 2
    for window, first in zip(windows, hidden, strict=True):
        states = first
        for block, call in zip(blocks, calls, strict=True):
            states = call(block, states)
        logits = tiny_model.lm_head(tiny_model.model.norm(states))
        assert torch.allclose(logits, tiny_model(window[None]).logits, atol=1e-5)


def test_blocks_with_text_dependent_arguments_are_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 8)
            self.blocks = nn.ModuleList([Block()])

        def forward(self, input_ids, use_cache=False):
            hidden = self.embedding(input_ids)
            for block in self.blocks:
                hidden = block(hidden, extra=self.embedding(input_ids))
            return hidden

    class Block(nn.Module):
        def forward(self, hidden, extra):
            return hidden + extra

    model = Odd()
    with pytest.raises(SlabError, match="Odd hands its blocks arguments that depend on the text"):
        capture_block_calls(model, model.blocks, torch.arange(12).view(2, 6), torch.device("cpu"))
    assert "forward" not in vars(model.blocks[0])


class Toy(nn.Module):
    """q and k read one tensor, out another; what follows `out` may be left out."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)
        self.finished = 0
        self.apart = False

    def forward(self, hidden):
        states = self.q(hidden) + self.k(hidden.clone() if self.apart else hidden).repeat(1, 1, 2)
        outputs = self.out(states)
        self.finished += 1
        return outputs


def toy_stats(toy, windows, layers=("q", "k", "out")):
    chosen = {name: getattr(toy, name) for name in layers}
    return collect_stats(toy, chosen, lambda i: toy(windows[i]), [Use.FIT] * len(windows), with_gram=True, seed=0)


@torch.no_grad()
def test_layers_with_one_input_share_its_statistics():
    toy, windows = Toy(), torch.randn(3, 1, 5, 8)
    stats = toy_stats(toy, windows)
    inputs = windows.reshape(-1, 8)
    states = toy.q(inputs) + toy.k(inputs).repeat(1, 2)
    assert stats["q"].gram is stats["k"].gram
    assert stats["q"].kept is stats["k"].kept is not None
    assert stats["out"].kept is None  # nobody else would ask
    for name, rows in (("q", inputs), ("k", inputs), ("out", states)):
        assert stats[name].tokens == 15
        assert torch.allclose(stats[name].gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
        assert torch.allclose(stats[name].input_norms, rows.norm(dim=0))


@torch.no_grad()
def test_held_out_windows_have_a_gram_matrix_of_their_own():
    toy, windows = Toy(), torch.randn(4, 1, 5, 8)
    uses = [Use.FIT] * 3 + [Use.HOLD_BACK]
    stats = collect_stats(toy, {"q": toy.q}, lambda i: toy(windows[i]), uses, with_gram=True, seed=0)["q"]
    fitted, kept_back = windows[:3].reshape(-1, 8), windows[3, 0]
    assert torch.allclose(stats.gram, fitted.T @ fitted, rtol=1e-4, atol=1e-4)
    assert torch.allclose(stats.held_out, kept_back.T @ kept_back, rtol=1e-4, atol=1e-4)
    assert torch.allclose(stats.input_norms, windows.reshape(-1, 8).norm(dim=0))
    assert stats.unseen is None


@torch.no_grad()
@pytest.mark.parametrize("with_gram", [False, True])
def test_unseen_windows_give_rows_and_nothing_else(with_gram):
    toy, windows = Toy(), torch.randn(6, 1, 5, 8)

    def stats(uses):
        return collect_stats(toy, {"q": toy.q}, lambda i: toy(windows[i]), uses, with_gram=with_gram, seed=0)["q"]

    alone, more = stats([Use.FIT] * 4), stats([Use.FIT] * 4 + [Use.MEASURE] * 2)
    assert alone.tokens == more.tokens == 20
    assert torch.equal(alone.input_norms, more.input_norms)
    assert torch.equal(alone.sample, more.sample)
    assert torch.equal(alone.gram, more.gram) if with_gram else more.gram is None
    assert more.held_out is None
    rows = {tuple(row) for row in windows[4:].reshape(-1, 8).tolist()}
    assert more.unseen.shape == (512, 8)
    assert {tuple(row) for row in more.unseen.tolist()} == rows


@torch.no_grad()
def test_a_block_is_left_when_its_last_layer_is_reached():
    toy, windows = Toy(), torch.randn(3, 1, 5, 8)
    toy_stats(toy, windows)
    assert toy.finished == 1  # the first window shows which layer is the last
    assert not toy.q._forward_pre_hooks


@torch.no_grad()
def test_a_layer_that_runs_twice_per_window_is_seen_twice():
    class Twice(Toy):
        def forward(self, hidden):
            return self.out(self.q(hidden)) + self.q(2 * hidden)

    toy, windows = Twice(), torch.randn(2, 1, 5, 8)
    stats = toy_stats(toy, windows, ("q", "out"))
    inputs = windows.reshape(-1, 8)
    assert torch.allclose(stats["q"].gram, 5 * inputs.T @ inputs, rtol=1e-4, atol=1e-4)
    assert stats["q"].tokens == 20


@torch.no_grad()
def test_inputs_shared_in_some_windows_only_are_refused():
    toy, windows = Toy(), torch.randn(2, 1, 5, 8)

    def run(index):
        toy.apart = index == 1
        return toy(windows[index])

    with pytest.raises(SlabError, match="layer k shares its inputs with others in some windows only"):
        collect_stats(toy, {"q": toy.q, "k": toy.k}, run, [Use.FIT] * 2, with_gram=False, seed=0)


class Doubled:
    """Two ranks that see the same windows."""

    rank, size = 0, 2

    def share(self, count):
        return range(count)

    def gather(self, notes, tensors):
        return [(notes, {}), (notes, {})]

    def deliver(self, tensors, readers):
        for name, tensor in tensors.items():
            yield 0, name, tensor
            yield 1, name, tensor.clone()


@pytest.mark.parametrize(("world", "ranks"), [(ALONE, 1), (Doubled(), 2)])
def test_every_token_goes_to_every_expert_and_those_sent_there_are_counted(world, ranks):
    block = tiny("mixtral").model.layers[0].mlp
    separate_experts(block)
    layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    windows = torch.randn(3, 1, 7, 64, generator=torch.Generator().manual_seed(0))
    chosen = []
    handle = block.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2].flatten()))
    uses = [Use.FIT, Use.HOLD_BACK, Use.MEASURE]
    stats = collect_stats(block, layers, lambda i: block(windows[i]), uses, with_gram=False, seed=0, world=world)
    handle.remove()
    counts = torch.cat(chosen[:2]).bincount(minlength=4)  # the last window calibrates nothing
    assert len({tuple(one.input_norms.tolist()) for name, one in stats.items() if "down" not in name}) == 1
    kept = {id(one.kept) for name, one in stats.items() if "down" not in name}
    assert kept == {id(stats["experts.0.up_proj"].kept)}
    for number in range(4):
        for name in ("gate_proj", "up_proj", "down_proj"):
            found = stats[f"experts.{number}.{name}"]
            assert (found.tokens, found.routed) == (ranks * 14, ranks * counts[number])
    assert block.experts.note is None
