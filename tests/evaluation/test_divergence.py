"""The divergence from the dense model, against both models' whole logits."""

import copy

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from slablm.evaluation import perplexity
from slablm.evaluation.divergence import DenseOutputs, summary

TEXTS = {"one": torch.arange(2, 66).view(2, 32), "two": torch.arange(60, 156).view(3, 32)}


def disturbed(model):
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return other


def disturbed_blocks(model):
    """As after compression: embedding and head are the dense model's."""
    other = disturbed(model)
    other.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    other.lm_head.load_state_dict(model.lm_head.state_dict())
    return other


def tokens_apart(dense, other, windows):
    """KL of every predicted token, [windows, tokens], straight from the definition."""
    with torch.no_grad():
        p, q = (model(windows).logits[:, :-1].double().softmax(dim=-1) for model in (dense, other))
    return (p * (p / q).log()).sum(dim=-1)


@pytest.fixture
def softcapped():
    """A model that does something with its logits, and whose head is its embedding."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": 0.3}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).eval()


@pytest.mark.parametrize("name", ["tiny_model", "softcapped"])
def test_it_is_the_divergence_of_the_whole_logits(name, request):
    dense = request.getfixturevalue(name)
    other = disturbed(dense)  # the head, too
    results = DenseOutputs.of(dense, TEXTS).compare(other)
    assert list(results) == ["one", "two"]
    for text, windows in TEXTS.items():
        measured, kl = results[text]
        wanted = tokens_apart(dense, other, windows)
        assert measured == perplexity(other, windows)
        assert kl.window_means == pytest.approx(wanted.mean(dim=1).tolist(), rel=1e-3)
        assert kl.median == pytest.approx(wanted.flatten().kthvalue(-(-wanted.numel() // 2)).values.item(), rel=1e-3)
        assert kl.mean > 1e-4


def test_the_head_is_the_dense_models_even_if_the_other_has_its_own(tiny_model):
    """A rival from a file has a head of fewer bits: the dense distribution must not be taken through it."""
    other = copy.deepcopy(tiny_model)
    other.lm_head.weight.data *= 2
    (_, kl), *_ = DenseOutputs.of(tiny_model, TEXTS).compare(other).values()
    assert kl.window_means == pytest.approx(
        tokens_apart(tiny_model, other, TEXTS["one"]).mean(dim=1).tolist(), rel=1e-3
    )


def test_with_one_head_there_is_one_product_with_it(tiny_model):
    """Half of the time where the vocabulary is large; `test_it_is_the_divergence…` is about the numbers."""
    rows = []
    outputs, other = DenseOutputs.of(tiny_model, TEXTS), disturbed_blocks(tiny_model)
    for head in (outputs.head, other.lm_head):
        head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    compared = outputs.compare(other)
    assert rows == [1] * 5
    for (_, kl), windows in zip(compared.values(), TEXTS.values(), strict=True):
        assert kl.window_means == pytest.approx(tokens_apart(tiny_model, other, windows).mean(dim=1).tolist(), rel=1e-3)


def test_logits_rounded_to_16_bits_are_what_is_compared(tiny_model):
    """Their rounding is part of what such a model predicts, and no product of hidden states has it."""
    dense, other = tiny_model.bfloat16(), disturbed_blocks(tiny_model.bfloat16())
    (_, kl), *_ = DenseOutputs.of(dense, TEXTS).compare(other).values()
    with torch.no_grad():
        p, q = (model(TEXTS["one"]).logits[:, :-1].double().softmax(dim=-1) for model in (dense, other))
    assert kl.window_means == pytest.approx((p * (p / q).log()).sum(dim=-1).mean(dim=1).tolist(), rel=1e-3)


def test_the_dense_model_does_not_diverge_from_itself(tiny_model):
    outputs = DenseOutputs.of(tiny_model, TEXTS)
    for name, (measured, kl) in outputs.compare(tiny_model).items():
        assert kl.median == kl.percentile99 == kl.mean == 0
        assert measured == outputs.texts[name].perplexity == perplexity(tiny_model, TEXTS[name])


def test_progress_counts_the_windows_of_all_texts(tiny_model):
    steps = []
    outputs = DenseOutputs.of(tiny_model, TEXTS, lambda *step: steps.append(step))
    outputs.compare(tiny_model, lambda *step: steps.append(step))
    assert steps == 2 * [(done, 5) for done in range(1, 6)]


def test_no_hook_stays_behind(tiny_model):
    DenseOutputs.of(tiny_model, TEXTS).compare(tiny_model)
    assert tiny_model(TEXTS["one"]).logits.shape[0] == 2


def test_median_and_percentile():
    windows = [torch.arange(1, 51.0), torch.arange(51, 101.0)]
    result = summary(windows)
    assert (result.window_means, result.median, result.percentile99) == ((25.5, 75.5), 50, 99)
    assert result.mean == 50.5
