"""Prompts on the path: models read what they would without it, whatever cache, mask and type."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from slablm.runtime import block_prompt
from slablm.runtime.kernels import native
from tests.runtime.test_token_path import (
    CACHE,
    KNOWN,
    TOLERANCES,
    assert_alike,
    assert_caches_alike,
    compared,
    fed,
    model_on_path,
    part_of,
    tokens_of,
)

LIBRARY = native.load()
pytestmark = pytest.mark.skipif(isinstance(LIBRARY, str) or not LIBRARY.batched, reason="no kernels for many tokens")
LENGTH = 40


def assert_read(model, run, taken):
    """Logits and caches are those of the blocks; `taken` times the path was."""
    (logits, cache), (own_logits, own_cache), count = compared(run)
    assert_alike(logits, own_logits)
    if cache is not None:
        assert_caches_alike(cache, own_cache)
    assert count == taken


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", KNOWN)
def test_prompts_of_all_families(family, dtype, padded):
    """Longer than the windows of those that have some."""
    windows = {"mistral": {"sliding_window": 16}, "gemma3_text": {"sliding_window": 16}}
    model, tokens = model_on_path(family, dtype, **windows.get(family, {})), tokens_of(count=LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, : 5 * padded] = 0

    def run():
        cache = DynamicCache(config=model.config)
        logits = model(tokens, attention_mask=mask, **{CACHE: cache}).logits
        return logits[:, 5 * padded :], cache

    if padded:  # keys and values of padding may be anything, as nobody looks at them
        given, own, taken = compared(lambda: run()[0])
        assert_alike(given, own)
        assert taken == 2
    else:
        assert_read(model, run, 2)


def test_a_prompt_in_pieces_and_then_new_tokens():
    model, tokens = model_on_path(), tokens_of(count=LENGTH + 6)

    def run():
        cache = DynamicCache(config=model.config)
        parts = [tokens[:, :16], tokens[:, 16:LENGTH], *tokens[:, LENGTH:].split(1, dim=1)]
        return torch.cat([model(part, **{CACHE: cache}).logits for part in parts], dim=1), cache

    assert_read(model, run, 2 * 8)


def test_without_a_cache():
    model, tokens = model_on_path(), tokens_of(count=LENGTH)
    assert_read(model, lambda: (model(tokens, use_cache=False).logits, None), 2)


def eager(model):
    model.config._attn_implementation = "eager"


def attends_to_all(model):
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


CHANGES = {
    "few tokens": (lambda model: None, 7),
    "a hook within": (lambda model: part_of(model, "mlp").register_forward_hook(lambda *arguments: None), LENGTH),
    "training": (lambda model: model.train(), LENGTH),
    "eager attention": (eager, LENGTH),
    "a dense layer": (lambda model: setattr(part_of(model, "mlp"), "up_proj", nn.Linear(64, 96)), LENGTH),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_blocks_run_themselves(change):
    model, (make, length) = model_on_path(num_hidden_layers=1), CHANGES[change]
    make(model)
    given, own, taken = compared(lambda: model(tokens_of(count=length)).logits)
    assert torch.equal(given, own)
    assert taken == 0


def test_blocks_that_see_the_future_run_themselves():
    """Whether tokens see those behind them is known when the block is recognised."""
    model = model_on_path(num_hidden_layers=1)
    block = vars(part_of(model))["forward"].runs._blocks[0]
    assert block.sees_the_past
    attends_to_all(model)
    assert not type(block)(part_of(model)).sees_the_past


def test_other_caches_are_left_to_the_block():
    model = model_on_path(num_hidden_layers=1)

    def run():
        return fed(model, tokens_of(count=LENGTH), StaticCache(config=model.config, max_cache_len=64), prompt=LENGTH)

    given, own, taken = compared(run)
    assert torch.equal(given, own)
    assert taken == 0


@pytest.mark.parametrize("mask", [torch.zeros(1, 1, LENGTH, LENGTH), torch.ones(1, 2, LENGTH, LENGTH).bool()])
def test_masks_of_numbers_and_of_heads_are_left_to_the_block(mask):
    model = model_on_path(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    given, own, taken = compared(lambda: model(tokens_of(count=LENGTH), attention_mask=mask).logits)
    assert torch.equal(given, own)
    assert taken == 0


@pytest.mark.parametrize("known", [0, 20])
@pytest.mark.parametrize("at", [0, 1])
def test_a_cache_is_as_it_was_where_the_block_has_to_run_itself(known, at):
    """Something overflows behind the cache, which has got the new tokens by then."""
    model, tokens = model_on_path(), tokens_of(count=LENGTH)
    model.model.layers[at].mlp.up_proj.bias = nn.Parameter(torch.full((96,), 3e38), requires_grad=False)

    def run():
        cache = DynamicCache(config=model.config)
        if known:
            model(tokens[:, :known], **{CACHE: cache})
        return model(tokens[:, known:], **{CACHE: cache}).logits, cache

    (_, cache), (own_logits, own_cache), taken = compared(run)
    assert not own_logits.isfinite().all()
    assert taken == at * (1 + bool(known))
    assert cache.get_seq_length(0) == own_cache.get_seq_length(0) == LENGTH
    assert_alike(cache.layers[0].keys, own_cache.layers[0].keys)


def test_a_layer_that_a_cache_did_not_have_is_taken_away(monkeypatch):
    monkeypatch.setattr(block_prompt.Prompt, "outputs", lambda *arguments: None)
    model, cache = model_on_path(num_hidden_layers=1), DynamicCache()
    given = model(tokens_of(count=LENGTH), **{CACHE: cache}).logits
    assert cache.get_seq_length() == LENGTH
    own = model(tokens_of(count=LENGTH), **{CACHE: DynamicCache()}).logits
    assert torch.equal(given, own)


def test_a_copy_of_a_model_reads_with_its_own_numbers():
    model, tokens = model_on_path(num_hidden_layers=1), tokens_of(count=LENGTH)
    with torch.no_grad():
        before = model(tokens).logits
        copied = copy.deepcopy(model)
        part_of(copied, "input_layernorm").weight.data.mul_(2)
        given, own, taken = compared(lambda: copied(tokens).logits)
        assert_alike(given, own)
        assert taken == 1
        assert (given - before).norm() > 0.01 * before.norm()
        assert torch.equal(model(tokens).logits, before)
