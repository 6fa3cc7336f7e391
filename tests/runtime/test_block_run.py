"""Runs of blocks: one call for all that follow each other, and the model's own results wherever the guess was wrong."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import DynamicCache

from slablm.runtime import block_run, cache_room
from slablm.runtime.block_given import Given
from slablm.runtime.kernels import native
from tests.runtime.test_token_path import (
    CACHE,
    PROMPT,
    TOKENS,
    assert_alike,
    assert_caches_alike,
    compared,
    fed,
    model_on_path,
    tokens_of,
)

pytestmark = pytest.mark.skipif(isinstance(native.load(), str), reason="no compiled kernels")
BLOCKS = 4


@pytest.fixture
def runs(monkeypatch):
    """How many blocks each call of the kernels has run."""
    counts, run = [], block_run.kernel.run

    def counted(library, name, blocks, inputs, rotary, places, mask):
        counts.append(len(places))
        return run(library, name, blocks, inputs, rotary, places, mask)

    monkeypatch.setattr(block_run.kernel, "run", counted)
    return counts


def learned(family="llama", **changes):
    """A model that has seen which blocks follow each other."""
    model = model_on_path(family, num_hidden_layers=BLOCKS, **changes)
    fed(model, tokens_of(count=PROMPT + 2))
    return model


def layers_of(model):
    return model.model.layers


def assert_right(model, taken=BLOCKS * TOKENS):
    """What the model gives is what its blocks give, caches included."""

    def run():
        cache = DynamicCache(config=model.config)
        return fed(model, tokens_of(), cache), cache

    (given, cache), (own, own_cache), count = compared(run)
    assert_alike(given, own)
    assert_caches_alike(cache, own_cache)
    assert count == taken


def test_all_blocks_run_in_one_call_from_the_second_token_on(runs):
    model = model_on_path(num_hidden_layers=BLOCKS)
    runs.clear()  # each block has been compared with itself
    fed(model, tokens_of())
    assert runs == [1] * BLOCKS + [BLOCKS] * (TOKENS - 1)
    runs.clear()
    fed(model, tokens_of())
    assert runs == [BLOCKS] * TOKENS, "a prompt makes it forget"


def test_blocks_with_other_positions_and_masks_begin_runs_of_their_own(runs):
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = learned("gemma3_text", layer_types=kinds, sliding_window=8)
    runs.clear()
    assert_right(model)
    assert runs[:3] == [2, 1, 1]


def change_in_place(module, inputs):
    inputs[0].mul_(2)


CHANGES = {
    "before the next block": lambda model: layers_of(model)[2].register_forward_pre_hook(change_in_place),
    "of what a block returns": lambda model: layers_of(model)[1].register_forward_hook(
        lambda module, inputs, output: output.mul_(2)
    ),
    "of a copy": lambda model: layers_of(model)[1].register_forward_hook(lambda module, inputs, output: 2 * output),
    "of equal numbers": lambda model: layers_of(model)[1].register_forward_hook(
        lambda module, inputs, output: output.clone()
    ),
    "of an earlier output": lambda model: layers_of(model)[2].register_forward_hook(
        lambda module, inputs, output: inputs[0]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_hooks_between_blocks_change_what_follows(change, mode):
    model = learned()
    CHANGES[change](model)
    with mode():
        assert_right(model)


def test_a_model_that_changes_tensors_between_its_blocks(runs):
    """Without a hook that one could see: what is done in place is counted."""

    class Doubled(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.on = block, False

        def forward(self, hidden_states, **kwargs):
            return self.block(hidden_states.mul_(2) if self.on else hidden_states, **kwargs)

    model = model_on_path(num_hidden_layers=BLOCKS)
    layers_of(model)[2] = doubled = Doubled(layers_of(model)[2])
    doubled.attention_type = "full_attention"
    fed(model, tokens_of(count=PROMPT + 2))
    doubled.on = True
    runs.clear()
    assert_right(model)
    assert runs[:2] == [BLOCKS, 2]


ORDERS = {
    "another order": [0, 2, 1, 3],
    "fewer": [0, 1],
    "one left out": [0, 1, 3],
    "one twice": [0, 1, 1, 2, 3],
}


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_that_are_called_otherwise(order):
    """One that is called twice for a token appends twice."""
    model = learned()
    layers = layers_of(model)
    model.model.layers = nn.ModuleList(layers[i] for i in ORDERS[order])
    model.config.num_hidden_layers = len(ORDERS[order])
    given, own, taken = compared(lambda: fed(model, tokens_of(), DynamicCache()))
    assert_alike(given, own)
    assert taken == len(ORDERS[order]) * TOKENS


@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp", "input_layernorm"])
@pytest.mark.parametrize("at", [0, 2, BLOCKS - 1])
def test_a_block_with_a_hook_within_parts_the_run(at, part, runs):
    model, seen = learned(), []
    handle = layers_of(model)[at].get_submodule(part).register_forward_hook(lambda *arguments: seen.append(1))
    runs.clear()
    assert_right(model, (BLOCKS - 1) * TOKENS)
    assert len(seen) == 2 * (TOKENS + 1)
    lengths = [length for length in (at, BLOCKS - 1 - at) if length]
    assert runs[-len(lengths) :] == lengths
    handle.remove()
    fed(model, tokens_of())
    assert runs[-1] == BLOCKS, "it does not come back"


def test_hooks_on_all_modules_are_called():
    model, seen = learned(), []
    handle = register_module_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    try:
        assert_right(model, taken=0)
    finally:
        handle.remove()
    assert seen.count(type(layers_of(model)[0].mlp)) == 2 * BLOCKS * (TOKENS + 1)


@pytest.mark.parametrize("at", [0, 2])
def test_a_block_that_is_not_finite_runs_itself(at):
    """All of it is infinite from there on; before, it is as it was."""
    model = learned()
    layers_of(model)[at].mlp.gate_proj.bias = nn.Parameter(torch.full((96,), 3e38), requires_grad=False)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    results = iter(caches)
    given, own, _ = compared(lambda: fed(model, tokens_of(), next(results)))
    torch.testing.assert_close(given, own, rtol=1e-2, atol=1e-2, equal_nan=True)
    assert not own[:, PROMPT:].isfinite().all()
    for layer, expected in zip(*(cache.layers[: at + 1] for cache in caches), strict=True):
        assert_alike(layer.keys, expected.keys)


def test_nothing_is_shown_of_a_token_that_is_broken_off():
    model, cache = learned(), DynamicCache()
    fed(model, tokens_of(2, PROMPT + 2), cache)
    before = copy.deepcopy(cache)
    runs = vars(layers_of(model)[0])["forward"].runs
    made = runs._made

    def made_and_stopped(*arguments):
        assert len(made(*arguments).outputs) == BLOCKS
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_made", made_and_stopped)
        with pytest.raises(KeyboardInterrupt):
            fed(model, tokens_of(2, 1), cache)
    assert_caches_alike(cache, before)
    given, own = (fed(model, tokens_of(2, 3), each, prompt=0) for each in (cache, before))
    assert torch.equal(given, own)


def test_two_caches_in_turns():
    """The run of one must not be taken for the other's, whose tokens are the same."""
    model, tokens = learned(), tokens_of(2, 9)
    caches = [DynamicCache() for _ in range(2)]
    for cache in caches:
        fed(model, tokens[:, :5], cache)
    for token in tokens[:, 5:].split(1, dim=1):
        first, second = (model(token, **{CACHE: cache}).logits for cache in caches)
        assert torch.equal(first, second)
    assert [cache.get_seq_length(BLOCKS - 1) for cache in caches] == [9, 9]


def test_a_cache_of_another_model_on_the_path_is_refused():
    """It has room, but heads of other sizes: the kernels would read and write elsewhere."""
    model, other, cache = learned(head_dim=16), learned(head_dim=32), DynamicCache()
    fed(other, tokens_of(2, PROMPT + 2), cache)
    with pytest.raises(RuntimeError, match="[Ss]izes of tensors"):
        fed(model, tokens_of(2, 1), cache)


def test_nothing_keeps_a_cache():
    model, cache = learned(), DynamicCache()
    before = len(cache_room._ROOMS)
    fed(model, tokens_of(), cache)
    assert len(cache_room._ROOMS) == before + BLOCKS
    del cache
    assert len(cache_room._ROOMS) == before


@pytest.mark.parametrize("most", [0, 2**25])
def test_large_caches_are_moved_layer_by_layer(most, monkeypatch):
    monkeypatch.setattr(cache_room, "_MOST_ON_A_SHELF", most)
    model, cache = learned(), DynamicCache()
    fed(model, tokens_of(), cache)
    storages = {layer.keys.untyped_storage().data_ptr() for layer in cache.layers}
    assert len(storages) == (1 if most else BLOCKS)
    assert_right(model)


def test_layers_on_one_shelf_do_not_share_tokens():
    """After one has been cropped, and another has got other tensors."""
    model, tokens = learned(), tokens_of(1, 16)

    def run():
        cache = DynamicCache()
        logits = [fed(model, tokens[:, :8], cache)]
        cache.crop(-2)
        cache.layers[1].keys = cache.layers[1].keys.clone()
        logits += [fed(model, tokens[:, 8:], cache, prompt=0)]
        return torch.cat(logits, dim=1), cache

    (given, cache), (own, own_cache), _ = compared(run)
    assert_alike(given, own)
    assert_caches_alike(cache, own_cache)


def test_tensors_that_a_cache_has_shown_stay():
    model, cache, kept = learned(), DynamicCache(), []
    for token in tokens_of(1, 12).split(1, dim=1):
        model(token, **{CACHE: cache})
        kept.append([layer.keys for layer in cache.layers])
    for before, after in pairwise(kept):
        for keys, longer in zip(before, after, strict=True):
            assert torch.equal(keys, longer[:, :, : keys.shape[2]])


@pytest.mark.parametrize("sizes", [(48, 2, 16, 16), (64, 3, 16, 16), (64, 2, 24, 16), (64, 2, 48, 48)])
def test_shapes_that_kernels_would_misread(sizes):
    (width, rows, turned, other), shape = sizes, block_run.kernel.BlockShape(64, 96, 4, 2, 32, "silu", 1.0)
    rotary = torch.ones(rows, 1, turned), torch.ones(rows, 1, other)
    assert not Given(rotary, None, None).suits(torch.ones(2, 1, width), shape)
