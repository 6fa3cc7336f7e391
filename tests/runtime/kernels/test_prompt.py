"""A decoder block for many tokens in two calls: what the block's definition gives in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from slablm.runtime.kernels import block as kernel
from slablm.runtime.kernels import native
from slablm.runtime.kernels.block import BlockShape
from slablm.runtime.kernels.prompt import Prompt
from tests.runtime.kernels.test_block import FLOATS, LIBRARY, SMALL, Kind, Random, normed, product, products, turned

SETS = () if isinstance(LIBRARY, str) else LIBRARY.batched
PLAIN = Kind()

pytestmark = pytest.mark.skipif(not SETS, reason="no kernels for many tokens")


class Reading:
    """A block, some tokens, and what there is in the cache before them."""

    def __init__(
        self, seed=0, shape=SMALL, kind=PLAIN, dtype=torch.float32, size=(2, 20), past=0, turned=None, masked=0
    ):
        random = Random(seed, kind, dtype)
        self.shape, (sequences, tokens) = shape, size
        queries, keys, width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
        there = (True, kind.behind, True, kind.behind)
        self.norms = [random.norm(width, each) for each in there]
        self.norms += [random.norm(shape.head_dim, kind.head_norms) for _ in range(2)]
        self.projections = [
            *random.projections([queries, keys, keys], width, kind.joined[0]),
            random.projection(width, queries),
            *random.projections([shape.intermediate] * 2, width, kind.joined[1]),
            random.projection(width, shape.intermediate),
        ]
        self.inputs = random.numbers(sequences, tokens, width)
        rows, dimensions = (1, shape.head_dim) if turned is None else turned
        self.rotary = random.numbers(rows, tokens, dimensions), random.numbers(rows, tokens, dimensions)
        self.past = [random.numbers(sequences, shape.kv_heads, past, shape.head_dim) for _ in range(2)]
        self.mask = None
        if masked or past:
            self.mask = random.numbers(masked or 1, 1, tokens, past + tokens) > 0
            self.mask[..., -1] = True

    def run(self, name=SETS[0] if SETS else "", bits=14):
        """The outputs, and all keys and values; None where something is not finite."""
        description = kernel.describe(self.shape, self.norms, self.projections)
        prompt = Prompt(LIBRARY, name, description, self.shape, self.inputs, self.rotary, bits)
        new = prompt.heads()
        if new is None:
            return None
        keys, values = (torch.cat(pair, dim=2) for pair in zip(self.past, new, strict=True))
        return prompt.outputs(keys, values, self.mask), keys, values

    def truth(self):
        shape, d = self.shape, self.shape.head_dim
        attention, attention_out, mlp, mlp_out, of_query, of_key = self.norms
        x = self.inputs.double()
        rows = [shape.heads * d, shape.kv_heads * d, shape.kv_heads * d]
        made = products(self.projections[:3], normed(attention, x), rows)
        q, k, v = (part.unflatten(-1, (-1, d)).transpose(1, 2) for part in made)
        turns = [part[:, None] for part in self.rotary]  # for every head
        q, k = turned(normed(of_query, q), *turns), turned(normed(of_key, k), *turns)
        keys, values = (torch.cat([past.double(), new], dim=2) for past, new in zip(self.past, (k, v), strict=True))
        every = [tensor.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for tensor in (keys, values)]
        scores = shape.scaling * q @ every[0].transpose(-1, -2)
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if self.mask is None else self.mask
        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ every[1]
        mixed = mixed.transpose(1, 2).flatten(2)
        h = x + normed(attention_out, product(self.projections[3], mixed))
        gate, up = products(self.projections[4:6], normed(mlp, h), [shape.intermediate] * 2)
        active = functional.silu(gate) if shape.activation == "silu" else functional.gelu(gate, approximate="tanh")
        return h + normed(mlp_out, product(self.projections[6], active * up)), keys, values

    def check(self, tolerance=1e-3, **options):
        outputs, keys, values = self.run(**options)
        expected, true_keys, true_values = self.truth()
        eps = torch.finfo(outputs.dtype).eps
        # Keys and values are rounded to the model's type before attention reads them.
        tolerance += 2 * eps if outputs.dtype != torch.float32 else 0
        error = (outputs.double() - expected).norm(dim=-1)
        added = (expected - self.inputs.double()).norm(dim=-1)
        assert (error <= tolerance * added.mean() + eps * expected.norm(dim=-1)).all()
        for given_heads, true in ((keys, true_keys), (values, true_values)):
            assert (given_heads.double() - true).norm() <= (tolerance + eps) * true.norm()


@st.composite
def choices(draw):
    def lanes(most):
        return 16 * draw(st.integers(1, most))

    kv_heads, head_dim, sequences = draw(st.integers(1, 3)), lanes(6), draw(st.integers(1, 3))
    activation = draw(st.sampled_from(sorted(kernel.ACTIVATIONS)))
    heads = kv_heads * draw(st.integers(1, 3))
    return {
        "seed": draw(st.integers(0, 2**31)),
        "shape": BlockShape(lanes(10), lanes(14), heads, kv_heads, head_dim, activation, head_dim**-0.5),
        "kind": Kind(
            bits=draw(st.integers(2, 6)),
            rotated=draw(st.sampled_from([0, 0, 1, 8, 256])),
            joined=(draw(st.booleans()), draw(st.booleans())),
            bias=draw(st.booleans()),
            behind=draw(st.booleans()),
            head_norms=draw(st.booleans()),
            offset=draw(st.sampled_from([0.0, 1.0])),
        ),
        "dtype": draw(st.sampled_from(FLOATS)),
        "size": (sequences, draw(st.integers(1, 70))),
        "past": draw(st.sampled_from([0, 0, 1, 30, 100])),
        "turned": (draw(st.sampled_from([1, sequences])), draw(st.sampled_from([head_dim, head_dim // 2, 2, 0]))),
        "masked": draw(st.sampled_from([0, 1, sequences])),
    }


@given(choices())
def test_it_equals_the_definition(chosen):
    Reading(**chosen).check()


@pytest.mark.parametrize(("past", "masked"), [(0, 0), (0, 2), (70, 1)])
def test_more_tokens_than_go_together(past, masked):
    Reading(size=(2, 300), past=past, masked=masked).check()


def test_a_window_that_moves():
    """Keys before the first and behind the last that a group of queries sees are not looked at."""
    reading = Reading(size=(1, 200), masked=1)
    distance = torch.arange(200)[:, None] - torch.arange(200)
    reading.mask = ((distance >= 0) & (distance < 30))[None, None].contiguous()
    reading.check()


def test_a_query_that_sees_nothing_adds_nothing():
    """As in a row of padding: its numbers do not matter, but they must be numbers."""
    reading = Reading(size=(1, 20), masked=1)
    reading.mask[:, :, 3] = False
    outputs, _, _ = reading.run()
    assert outputs.isfinite().all()


@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_scores_that_overflow_an_exponential(factor):
    reading = Reading(kind=Kind(head_norms=True), size=(1, 40))
    reading.norms[4].weight.mul_(factor)
    reading.check()


def test_eight_bits_are_coarser():
    Reading().check(tolerance=4e-2, bits=8)


def test_threads_do_not_change_a_bit():
    reading, threads = (
        Reading(shape=BlockShape(128, 640, 4, 2, 32, "silu", 0.2), size=(2, 150)),
        torch.get_num_threads(),
    )
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(reading.run())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for run in runs[1:] for pair in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_refused(value):
    reading = Reading()
    reading.inputs[1, 7, 5] = value
    assert reading.run() is None


def test_an_overflow_behind_the_cache_is_refused():
    reading = Reading()
    reading.norms[2].weight.fill_(1e30)
    assert reading.run()[0] is None


def with_sizes(reading, **changes):
    for name, value in changes.items():
        setattr(reading, name, value)
    return reading


REFUSED = {
    "more turned than there is": lambda: with_sizes(Reading(), rotary=(torch.ones(1, 20, 32),) * 2),
    "an odd number of turned": lambda: with_sizes(Reading(), rotary=(torch.ones(1, 20, 15),) * 2),
    "other heads than the weights have": lambda: with_sizes(Reading(), shape=BlockShape(64, 96, 2, 2, 16, "silu", 1.0)),
    "no token": lambda: with_sizes(Reading(), inputs=torch.ones(2, 0, 64)),
    "no mask, and tokens before": lambda: with_sizes(Reading(past=5), mask=None),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_c_would_misread_is_refused(why):
    with pytest.raises(RuntimeError, match="refused its arguments"):
        REFUSED[why]().run()


def test_bits_and_instruction_sets_that_there_are_not():
    with pytest.raises(RuntimeError, match="refused its arguments"):
        Reading().run(bits=7)
    others = [name for name in LIBRARY.supported if name not in LIBRARY.batched]
    assert "portable" in others
    with pytest.raises(RuntimeError):
        Reading().run(name="portable")
    assert native.INSTRUCTION_SETS["portable"] == 0
