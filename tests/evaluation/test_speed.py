"""Measuring speed: what is counted, in which order, and what is refused. No test looks at a real time."""

import pytest
import torch

from slablm import SlabError, SlabLinear
from slablm.dense.loading import load
from slablm.evaluation import speed
from slablm.evaluation.speed import Samples, Workload, measure_speed, prompt, weight_bytes, write
from slablm.runtime import kernels

WORKLOAD = Workload(prompt_tokens=10, new_tokens=4)


class Clock:
    """A clock that moves on by one second each time it is looked at."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        self.now += 1
        return self.now


def watched(model, name, calls):
    """Note every forward pass: (contender, tokens read, threads)."""
    model.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append((name, kwargs["input_ids"].shape[1], torch.get_num_threads())),
        with_kwargs=True,
    )
    return model


@pytest.fixture
def pair(tiny_folder):
    return {name: load(str(tiny_folder))[0] for name in ("first", "second")}


def test_contenders_take_turns(pair):
    calls, steps = [], []
    contenders = {name: watched(model, name, calls) for name, model in pair.items()}
    before = torch.get_num_threads()
    speeds = measure_speed(contenders, WORKLOAD, 2, [1, 2], on_run=lambda *step: steps.append(step))
    assert torch.get_num_threads() == before
    one_run = [10, 10, 1, 1, 1]  # the prompt alone; then the prompt again and each new token but the last
    turn = [(name, tokens) for name in ("first", "second") for tokens in one_run]
    rounds = 1 + 2  # one is not measured
    assert calls == [(*call, threads) for threads in (1, 2) for _ in range(rounds) for call in turn]
    assert steps == [(i + 1, 2 * rounds * 2) for i in range(2 * rounds * 2)]
    assert [(s.threads, s.contender) for s in speeds] == [(1, "first"), (1, "second"), (2, "first"), (2, "second")]


def test_what_is_divided_by_what(pair):
    found = measure_speed({"first": pair["first"]}, WORKLOAD, 3, [1], clock=Clock())[0]
    # The clock is read at: start, end of the prompt; start of generate, its prompt, its 4 tokens.
    assert found.prefill == Samples((10.0,) * 3)
    assert found.first_token == Samples((2.0,) * 3)
    assert found.decode == Samples((1.0,) * 3)
    assert found.document is None


def test_a_document_is_read_and_summarised(pair, monkeypatch):
    monkeypatch.setattr(speed, "DOCUMENT_TOKENS", 20)
    monkeypatch.setattr(speed, "SUMMARY_TOKENS", 3)
    calls = []
    model = watched(pair["first"], "first", calls)
    found = measure_speed({"first": model}, Workload(10, 4, document=True), 1, [1], clock=Clock())[0]
    assert [tokens for _, tokens, _ in calls[-3:]] == [20, 1, 1]
    assert found.document == Samples((1.0,))


def test_threads_are_restored_after_an_error(tiny_model):
    def stop(*_):
        raise KeyboardInterrupt

    before = torch.get_num_threads()
    tiny_model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        measure_speed({"model": tiny_model}, WORKLOAD, 1, [before + 1])
    assert torch.get_num_threads() == before


def test_generation_never_stops_early(tiny_model):
    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()  # all logits 0: greedy takes token 0, which is made the end of text
    tiny_model.generation_config.eos_token_id = 0
    tokens = prompt(tiny_model, 5)
    assert write(tiny_model, tokens, 20).shape == (1, 25)
    stopped = tiny_model.generate(input_ids=tokens, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert stopped.shape == (1, 6)


def test_prompts_are_always_the_same_valid_tokens(tiny_model):
    tokens = prompt(tiny_model, 100)
    assert torch.equal(tokens, prompt(tiny_model, 100))
    assert tokens.shape == (1, 100)
    assert tokens.min() >= 0
    assert tokens.max() < 258


def test_medians_spread_and_ratios():
    samples = Samples((4.0, 1.0, 2.0, 3.0, 5.0))
    assert samples.median == 3
    assert samples.spread == 2  # quartiles 2 and 4
    assert Samples((7.0,)).spread is None
    # The machine was twice as slow in the second half of the rounds; the ratio within each is the same.
    assert Samples((6.0, 6.0, 3.0, 3.0)).ratio_to(Samples((4.0, 4.0, 2.0, 2.0))) == 1.5


# Tiny Llama: 2 blocks, hidden 64, MLP 96, keys and values 32, vocabulary 258, head dimension 16.
BLOCK_LINEARS = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3
DENSE_PARAMETERS = 2 * 258 * 64 + 2 * (BLOCK_LINEARS + 2 * 64) + 64


def buffer_bytes(model):
    """Rotary frequencies, and the matrices that stay in 16 bits."""
    return sum(buffer.nbytes for name, buffer in model.named_buffers() if "inv_freq" in name or "weight" in name)


def test_weight_bytes_of_a_dense_model(tiny_model):
    assert buffer_bytes(tiny_model) in (8 * 4, 2 * 8 * 4)  # rotary frequencies, in some versions twice
    assert weight_bytes(tiny_model) == 4 * DENSE_PARAMETERS + buffer_bytes(tiny_model)
    tiny_model.lm_head.weight = tiny_model.model.embed_tokens.weight
    assert weight_bytes(tiny_model) == 4 * (DENSE_PARAMETERS - 258 * 64) + buffer_bytes(tiny_model)


def test_weight_bytes_of_a_compressed_model(compressed_folder, tiny_folder):
    model, _ = load(str(compressed_folder))
    layers = [layer for layer in model.modules() if isinstance(layer, SlabLinear)]
    assert len(layers) == 14
    if kernels.backend().library is None:
        packed = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    else:
        packed = sum(layer.native.nbytes for layer in layers)
    others = sum(parameter.nbytes for parameter in model.parameters()) + buffer_bytes(model)
    assert weight_bytes(model) == packed + others
    assert weight_bytes(model) < weight_bytes(load(str(tiny_folder))[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Workload(prompt_tokens=0), "at least 1 token, got 0"),
        (lambda: Workload(new_tokens=1), "at least 2 new tokens, got 1"),
    ],
)
def test_bad_workloads(make, message):
    with pytest.raises(SlabError, match=message):
        make()


@pytest.mark.parametrize(
    ("workload", "rounds", "threads", "message"),
    [
        (WORKLOAD, 0, [1], "at least 1 round is needed, got 0"),
        (WORKLOAD, 1, [1, 0], "thread counts must be 1 or more, got 1, 0"),
        (WORKLOAD, 1, [], "thread counts must be 1 or more, got none"),
        (Workload(120, 9), 1, [1], "model: 120 prompt .* 128 positions: use at most 119 prompt tokens"),
        (Workload(10, 4, document=True), 1, [1], "model: a document of 512 tokens .* leave the document out"),
    ],
)
def test_bad_input(tiny_model, workload, rounds, threads, message):
    with pytest.raises(SlabError, match=message):
        measure_speed({"model": tiny_model}, workload, rounds, threads)


def test_the_longest_workload_that_fits(tiny_model):
    Workload(119, 9).check("model", tiny_model)
