"""The drift of whole models, by hooks, beside the hidden states that transformers returns."""

import copy

import pytest
import torch
from torch import nn

from slablm import CompressionConfig, SlabError
from slablm.compression.blocks import compress_blocks
from slablm.compression.preparation import prepare_model
from slablm.compression.store import BlockStore
from slablm.dense.targets import select_targets
from slablm.evaluation.drift import DenseStreams
from slablm.methods.drift import Drift
from tests import reference
from tests.compression.folders import build
from tests.conftest import tiny_config

WINDOWS = torch.randint(3, 200, (6, 24), generator=torch.Generator().manual_seed(0))


def noisy(model, scale=0.01):
    """The model with other weights in its blocks."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in other.model.layers.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return other


@torch.no_grad()
def hidden_states(model, window):
    """Behind every block, [tokens, hidden] each; the last one is not behind the final norm."""
    model = copy.deepcopy(model)
    model.model.norm = nn.Identity()
    return [states[0] for states in model(window[None], output_hidden_states=True).hidden_states[1:]]


def test_against_the_models_own_hidden_states(tiny_model):
    other = noisy(tiny_model)
    found = DenseStreams.of(tiny_model, WINDOWS[:3]).drift(other)
    dense, changed = ([hidden_states(model, window) for window in WINDOWS[:3]] for model in (tiny_model, other))
    assert len(found) == 2
    for index, drift in enumerate(found):
        expected = reference.drift([states[index] for states in dense], [states[index] for states in changed])
        assert (drift.first, drift.rest) == pytest.approx(expected, rel=1e-6)
        assert drift.rest > 0


def test_the_dense_model_itself_does_not_drift(tiny_model):
    streams = DenseStreams.of(tiny_model, WINDOWS)
    assert streams.drift(tiny_model) == [Drift(0.0, 0.0)] * 2
    assert streams.drift(noisy(tiny_model))[0].rest > 0  # what is kept does not change with use
    assert streams.drift(copy.deepcopy(tiny_model)) == [Drift(0.0, 0.0)] * 2
    assert not any(block._forward_hooks for block in tiny_model.model.layers)


@pytest.mark.parametrize("method", ["slab", "rtn"])
def test_streams_and_hooks_measure_the_same(tiny_model, method):
    """Block by block while it is compressed, and afterwards; with packed layers, and with Ŵ in linear ones."""
    config = CompressionConfig(method, num_samples=4, seq_len=24, iterations=2)
    targets = select_targets(tiny_model, config)
    config = prepare_model(tiny_model, targets, config)
    streams, store = DenseStreams.of(tiny_model, WINDOWS[4:]), BlockStore()
    compress_blocks(tiny_model, targets, WINDOWS, config, store=store)
    found = streams.drift(tiny_model)
    assert len(found) == len(store.drift) == 2
    for by_hooks, by_stream in zip(found, store.drift, strict=True):
        assert (by_hooks.first, by_hooks.rest) == pytest.approx((by_stream.first, by_stream.rest), rel=1e-4)
        assert 0.01 < by_stream.rest < 1


def test_a_huge_first_token_stands_apart(tiny_model):
    """As the attention sink does: token 3 begins every window."""
    tiny_model.model.embed_tokens.weight.data[3] *= 3000
    windows = WINDOWS[:2].clone()
    windows[:, 0] = 3
    other = noisy(tiny_model)
    dense, changed = ([hidden_states(model, window) for window in windows] for model in (tiny_model, other))
    for index, drift in enumerate(DenseStreams.of(tiny_model, windows).drift(other)):
        before, after = (torch.stack([states[index] for states in model]) for model in (dense, changed))
        assert before[:, 0].square().sum() > 0.99 * before.square().sum()
        assert (after - before).norm() / before.norm() < 0.05 * drift.rest
        alone = (after - before)[:, 1:].norm() / before[:, 1:].norm()
        assert drift.rest == pytest.approx(alone.item(), rel=1e-4)


def test_blocks_that_return_tuples(tmp_path):
    """And whose list has another name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(build(tmp_path, "gpt_neox")).eval()
    streams = DenseStreams.of(model, WINDOWS[:2])
    assert streams.drift(model) == [Drift(0.0, 0.0)] * len(streams.drift(model))
    model.gpt_neox.layers[0].mlp.dense_4h_to_h.weight.data *= 0.5
    assert all(drift.rest > 0 for drift in streams.drift(model))


def test_another_model_is_refused(tiny_model):
    from transformers import LlamaForCausalLM

    streams = DenseStreams.of(tiny_model, WINDOWS[:1])
    deeper = LlamaForCausalLM(tiny_config(num_hidden_layers=3))
    with pytest.raises(SlabError, match="the model has 3 decoder blocks, the dense one has 2: it is another model"):
        streams.drift(deeper)
    wider = LlamaForCausalLM(tiny_config(hidden_size=80))
    with pytest.raises(SlabError, match=r"of block 0 is \[1, 24, 80\], the dense model's is \[1, 24, 64\]"):
        streams.drift(wider)
    assert not any(block._forward_hooks for block in wider.model.layers)


def test_what_cannot_be_measured_is_refused(tiny_model):
    with pytest.raises(SlabError, match="no windows to measure the drift on"):
        DenseStreams.of(tiny_model, WINDOWS[:0])
    streams = DenseStreams.of(tiny_model, WINDOWS[:1])
    tiny_model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(SlabError, match="NaN or Inf in the output of block 1"):
        streams.drift(tiny_model)
