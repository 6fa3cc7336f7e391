"""Embedding and head in int8 rows."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from slablm import SlabError
from slablm.packing.quantize import quantize_rows
from slablm.runtime.int8 import Int8Embedding, Int8Linear, head_and_embedding, int8_names, tie_scales, use_int8
from tests.compression.test_architectures import FAMILIES, SMALL, tiny

TOKENS = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))


def rounded(model):
    """The dense model with the numbers that int8 rows stand for."""
    for name in head_and_embedding(model):
        weight = model.get_submodule(name).weight
        rows, scales = quantize_rows(weight)
        if not getattr(weight, "done", False):  # a tied one once
            weight.data, weight.done = (rows.float() * scales.float()[:, None]).to(weight.dtype), True
    return model


def in_rows(model):
    use_int8(model, head_and_embedding(model))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_computes_the_same(family):
    dense, model = tiny(family), tiny(family)
    model = in_rows(model)
    assert int8_names(model) == sorted(head_and_embedding(dense))
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    expected = rounded(dense)(TOKENS).logits
    for tokens in (TOKENS, TOKENS[:, :1]):
        torch.testing.assert_close(model(tokens).logits, expected[:, : tokens.shape[1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
@torch.no_grad()
def test_embeddings_are_rounded_once_and_scaled_as_the_class_does(family, dtype):
    dense, model = rounded(tiny(family)), in_rows(tiny(family)).to(dtype)
    expected = dense.to(dtype).get_input_embeddings()(TOKENS)
    outputs = model.get_input_embeddings()(TOKENS)
    assert outputs.dtype == dtype
    assert torch.equal(outputs, expected)


def parts_of(model):
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    return [(end.weight, end.scales) for end in ends]


def assert_tied(model):
    (weight, scales), (other_weight, other_scales) = parts_of(model)
    assert weight is other_weight
    assert scales is other_scales


@torch.no_grad()
def test_casts_and_tie_weights_leave_one_pair_as_it_was():
    model = in_rows(tiny("llama-tied"))
    assert_tied(model)
    before = [part.clone() for part in parts_of(model)[0]]
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        model.to(dtype)
        model.tie_weights()
        assert_tied(model)
        assert all(map(torch.equal, parts_of(model)[0], before))
        assert [part.dtype for part in parts_of(model)[0]] == [torch.int8, torch.float16]
        assert model(TOKENS).logits.dtype == dtype


def test_on_another_device_they_are_still_one():
    model = in_rows(tiny("llama-tied")).to("meta")
    assert all(part.is_meta for part in parts_of(model)[0])
    model.tie_weights()
    assert_tied(model)
    assert model(TOKENS.to("meta")).logits.shape == (2, 9, 200)
    model.to_empty(device="cpu")
    assert [part.dtype for part in parts_of(model)[0]] == [torch.int8, torch.float16]


def test_scales_stay_where_memory_stays():
    model = in_rows(tiny("llama-tied"))
    before = parts_of(model)[0][1].clone()
    model.share_memory()
    assert all(part.is_shared() for part in parts_of(model)[0])
    assert_tied(model)
    model.get_input_embeddings().to_empty(device="cpu")
    assert torch.equal(parts_of(model)[0][1], before)


@torch.no_grad()
def test_copies_and_pickles():
    model = in_rows(tiny("llama-tied"))
    expected, file = model(TOKENS).logits, io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert_tied(other)
        assert parts_of(other)[0][0] is not parts_of(model)[0][0]
        assert torch.equal(other(TOKENS).logits, expected)
        other.tie_weights()
        assert_tied(other)


def test_a_model_loads_its_own_state():
    model, other = in_rows(tiny("llama")), in_rows(tiny("llama"))
    for end in (other.get_input_embeddings(), other.get_output_embeddings()):
        end.weight.zero_()
        end.scales.zero_()
    assert other.load_state_dict(model.state_dict()) == ([], [])
    with torch.no_grad():
        assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


def test_gradients_flow_through_the_head():
    model, dense = in_rows(tiny("llama-tied")), rounded(tiny("llama-tied"))
    grads = []
    for one in (model, dense):
        states = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        one(inputs_embeds=states).logits.square().sum().backward()
        grads.append(states.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
    assert model.get_input_embeddings().weight.grad is None


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_compiled(family):
    model = in_rows(tiny(family))
    ends = nn.Sequential(model.get_input_embeddings(), model.get_output_embeddings())
    expected = ends(TOKENS)
    torch.compiler.reset()
    assert torch.equal(torch.compile(ends, fullgraph=True, backend="aot_eager")(TOKENS), expected)


def test_a_bias_stays_what_it_was():
    model = tiny("phi")
    bias = model.lm_head.bias
    assert in_rows(model).lm_head.bias is bias
    assert "bias=True, stored=int8" in repr(model.lm_head)
    assert "embed_scale=8, stored=int8" in repr(in_rows(tiny("gemma3_text")).get_input_embeddings())


class Odd(nn.Embedding):
    pass


class OddLinear(nn.Linear):
    pass


def test_other_classes_are_refused_by_name():
    model = tiny("llama")
    model.model.embed_tokens = Odd(200, 64)
    with pytest.raises(SlabError, match=r"^model.embed_tokens has class Odd, .* stays in 16 bits: use --head-bits 16$"):
        head_and_embedding(model)
    model = tiny("llama")
    model.lm_head = OddLinear(64, 200)
    with pytest.raises(SlabError, match=r"^lm_head has class OddLinear, .*: use --head-bits 16$"):
        head_and_embedding(model)
    model = tiny("llama")
    model.model.embed_tokens.max_norm = 0.5
    with pytest.raises(SlabError, match=r"^model.embed_tokens has max_norm=0.5 .*: use --head-bits 16$"):
        head_and_embedding(model)


def test_what_shares_the_matrix_is_seen():
    model = tiny("llama")
    model.model.layers[0].other = OddLinear(64, 200, bias=False)
    model.model.layers[0].other.weight = model.lm_head.weight
    with pytest.raises(SlabError, match="layers.0.other has class OddLinear"):
        head_and_embedding(model)


def test_a_model_on_meta_gets_empty_rows():
    config = AutoConfig.for_model("llama", **SMALL, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    in_rows(model)
    assert_tied(model)
    assert [(part.is_meta, part.shape) for part in parts_of(model)[0]] == [(True, (200, 64)), (True, (200,))]


def test_rows_without_scales_that_are_tied_to_none():
    model = in_rows(tiny("llama"))
    model.lm_head._buffers["scales"] = None
    with pytest.raises(SlabError, match="lm_head has no scales of its own: load the model with tie_word_embeddings"):
        tie_scales(model)
