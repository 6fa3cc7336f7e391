"""Writing token by token, and conversations that read only what is new."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, cache_utils

from slablm import SlabError
from slablm.serving import kv_cache
from slablm.serving.conversation import Conversation
from slablm.serving.kv_cache import new_cache, use_in_generate
from slablm.serving.writing import Sampling, prompt_ids, write
from tests.serving.folders import TEMPLATE


@pytest.fixture(scope="module")
def model(compressed_folder):
    return AutoModelForCausalLM.from_pretrained(compressed_folder).eval()


@pytest.fixture
def talker(tokenizer):
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def test_what_is_written_is_what_generate_gives(model, tokenizer):
    ids, pieces = prompt_ids(tokenizer, "Hello"), []
    written = write(model, tokenizer, ids, Sampling(12), pieces.append)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    assert written.tokens == tuple(expected.tolist())
    assert "".join(pieces) == written.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert written.prompt_tokens == ids.shape[1]
    assert "tokens/s" in written.timing()


def test_a_stop_word_ends_the_text_in_front_of_it(model, tokenizer):
    ids = prompt_ids(tokenizer, "Hello")
    whole = write(model, tokenizer, ids, Sampling(12))
    word = whole.text[5:7]
    written = write(model, tokenizer, ids, Sampling(12, stop=(word,)))
    assert written.text == whole.text[: whole.text.index(word)]
    assert len(written.tokens) < len(whole.tokens)


def test_a_seed_repeats_a_draw_and_none_does_not(model, tokenizer):
    ids = prompt_ids(tokenizer, "Hello")
    drawn = [write(model, tokenizer, ids, Sampling(20, 1.5, seed=seed)).tokens for seed in (1, 1, 2, None, None)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 4


def test_the_most_likely_token_alone_is_greedy(model, tokenizer):
    ids = prompt_ids(tokenizer, "Hello")
    assert (
        write(model, tokenizer, ids, Sampling(8, 1.0, 1e-6)).tokens == write(model, tokenizer, ids, Sampling(8)).tokens
    )


def test_the_text_ends_where_the_model_does(model, tokenizer):
    """The model has 128 positions."""
    written = write(model, tokenizer, prompt_ids(tokenizer, "a" * 120), Sampling(50))
    assert len(written.tokens) <= 128 - 121
    with pytest.raises(SlabError, match="the text has 131 tokens, and the model reads at most 128: shorten it"):
        write(model, tokenizer, prompt_ids(tokenizer, "a" * 130), Sampling(50))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_p": 0}, "top_p must lie above 0"),
        ({"stop": ("",)}, "a stop word is empty"),
        ({"kv_cache": "int3"}, "kv_cache must be one of fp8, quanto, hqq, got 'int3'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(SlabError, match=message):
        Sampling(**settings)


def test_a_conversation_reads_only_what_is_new_and_answers_as_if_it_had_read_all(model, talker):
    conversation = Conversation(model, talker, Sampling(6), "Be brief")
    for question in ("One", "Two"):
        messages = [*conversation.messages, {"role": "user", "content": question}]
        ids = talker.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = talker(ids, return_tensors="pt", add_special_tokens=False)["input_ids"]
        afresh = write(model, talker, ids, Sampling(6))
        answer = conversation.ask(question)
        assert answer.tokens == afresh.tokens
    assert answer.prompt_tokens < afresh.prompt_tokens / 2
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 2]
    conversation.reset("")
    assert conversation.ask("One").prompt_tokens == len("user: One\nassistant: ")


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no fp8 cache")
def test_keys_and_values_may_be_quantised(model, talker):
    """As `generate` does it by itself; a conversation that cannot go back in its cache is read anew."""
    ids, sampling = prompt_ids(talker, "Hello"), Sampling(12, kv_cache="fp8")
    found = write(model, talker, ids, sampling).tokens
    other = copy.copy(model)
    other.generation_config = copy.deepcopy(model.generation_config)
    use_in_generate(other, "fp8")
    made = other.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1, return_dict_in_generate=True)
    assert found == tuple(made.sequences[0, ids.shape[1] :].tolist())
    kept = made.get("cache", made.get("past_key_values"))  # the name has changed in transformers 5.2x
    for cache in (kept, new_cache(model, "fp8")):
        assert {type(layer).__name__ for layer in cache.layers} == {"Fp8QuantizedLayer"}
    assert type(new_cache(model, None)) is DynamicCache
    conversation = Conversation(model, talker, sampling)
    for question in ("One", "Two"):
        assert len(conversation.ask(question).tokens) > 0
    assert all(type(layer).__name__ == "Fp8QuantizedLayer" for layer in conversation._cache.layers)


@pytest.mark.parametrize(("backend", "package"), [("quanto", "optimum-quanto"), ("hqq", "hqq")])
def test_a_package_for_quantised_keys_and_values_that_is_missing_is_named(backend, package, monkeypatch):
    for name in ("is_hqq_available", "is_optimum_quanto_available"):
        monkeypatch.setattr(kv_cache, name, lambda: False)
    with pytest.raises(SlabError, match=f"kv_cache {backend} needs a further package: pip install {package}"):
        Sampling(kv_cache=backend)


def test_an_interrupted_answer_is_part_of_the_conversation_and_nothing_half_read_is_kept(model, talker):
    conversation = Conversation(model, talker, Sampling(30))
    shown = []

    def interrupt(text):
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    answer = conversation.ask("One", interrupt)
    assert answer.interrupted
    assert conversation.messages[-1]["content"] == "".join(shown)
    assert conversation.ask("Two").prompt_tokens > 30  # all of it again


def test_what_cannot_be_said(model, talker):
    conversation = Conversation(model, talker, Sampling(6))
    conversation.ask("One")
    before = list(conversation.messages)
    for question, message in [("", "the question is empty"), ("\udc80", "no UTF-8"), ("a" * 200, "reads at most 128")]:
        with pytest.raises(SlabError, match=message):
            conversation.ask(question)
    assert conversation.messages == before
    talker.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SlabError, match="chat template does not take this conversation: roles must alternate"):
        conversation.ask("Two")
    talker.chat_template = None
    with pytest.raises(SlabError, match="no chat template"):
        conversation.ask("Two")
    assert not torch.is_inference_mode_enabled()
