"""A decoder block in one call: every instruction set gives what the block's definition gives in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from slablm.methods.rotation import Rotation, largest_block
from slablm.runtime.kernels import block as kernel
from slablm.runtime.kernels import native
from slablm.runtime.kernels.block import BlockShape, Norm, Projection
from tests.runtime.kernels.weights import random_symbols

LIBRARY = native.load()
SETS = () if isinstance(LIBRARY, str) else LIBRARY.supported
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SMALL = BlockShape(64, 96, 4, 2, 16, "silu", 0.25)
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

pytestmark = pytest.mark.skipif(not SETS, reason="no compiled kernels")


@dataclass(frozen=True)
class Kind:
    """What there may be or not be in a block; a rotation with blocks of up to so many columns, 0 for none."""

    bits: int = 4
    rotated: int = 16
    joined: tuple[bool, bool] = (False, False)
    bias: bool = True
    behind: bool = False
    head_norms: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Cached:
    """Keys and values [sequences, kv_heads, capacity, head_dim]; attention is from `first` to the new token's slot."""

    keys: torch.Tensor
    values: torch.Tensor
    first: int
    slot: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Step:
    """A block, and all that one call of it takes."""

    shape: BlockShape
    norms: list[Norm]
    projections: list[Projection]
    inputs: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    place: Cached

    def described(self):
        caches = kernel.describe_caches(self.place.keys, self.place.values)
        block = kernel.describe(self.shape, self.norms, self.projections)
        return block, kernel.Place(caches, self.place.first, self.place.slot)

    def run(self, name):
        block, place = self.described()
        outputs = kernel.run(LIBRARY, name, block, self.inputs, self.rotary, [place], self.place.mask)
        return outputs and outputs[0]

    def with_own_cache(self):
        return self.with_place(keys=self.place.keys.clone(), values=self.place.values.clone())

    def with_place(self, **changes):
        return replace(self, place=replace(self.place, **changes))


class Random:
    """Random parts; numbers are of size 1 wherever one looks."""

    def __init__(self, seed, kind, dtype):
        self.generator, self.kind, self.dtype = torch.Generator().manual_seed(seed), kind, dtype

    def numbers(self, *size, dtype=None):
        return torch.randn(*size, generator=self.generator).to(dtype or self.dtype)

    def seed(self):
        return int(torch.randint(2**31, (), generator=self.generator))

    def norm(self, size, there=True):
        weight = self.numbers(size) * 0.3 + 1 - self.kind.offset
        return Norm(weight, self.kind.offset, 1e-2) if there else Norm()

    def projection(self, rows, columns):
        rotation = None
        if self.kind.rotated:
            rotation = Rotation(columns, min(self.kind.rotated, largest_block(columns)), self.seed())
        weight = random_symbols(rows, columns, self.kind.bits, rotation, self.seed())
        weight.scales.mul_(3 * columns**-0.5)
        return Projection(weight, self.numbers(rows) * 0.3 if self.kind.bias else None)

    def projections(self, rows, columns, joined):
        if joined:
            return [self.projection(sum(rows), columns)] + [Projection()] * (len(rows) - 1)
        return [self.projection(count, columns) for count in rows]


def random_step(
    seed=0,
    shape=SMALL,
    kind=Kind(),
    dtype=torch.float32,
    cache_dtype=torch.float32,
    sequences=2,
    first=2,
    attended=6,
    spare=3,
    rotary=None,
    masked=0,
):
    """Caches are NaN but where attention is; `masked` is the number of rows of the mask."""
    random = Random(seed, kind, dtype)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    width, behind, heads = shape.hidden, kind.behind, kind.head_norms
    norms = [random.norm(width), random.norm(width, behind), random.norm(width), random.norm(width, behind)]
    norms += [random.norm(shape.head_dim, heads), random.norm(shape.head_dim, heads)]
    projections = [
        *random.projections([queries, keys, keys], width, kind.joined[0]),
        random.projection(width, queries),
        *random.projections([shape.intermediate] * 2, width, kind.joined[1]),
        random.projection(width, shape.intermediate),
    ]
    rows, turned = (sequences, shape.head_dim) if rotary is None else rotary
    slot = first + attended - 1
    caches = [torch.full((sequences, shape.kv_heads, slot + 1 + spare, shape.head_dim), torch.nan) for _ in range(2)]
    for cache in caches:
        cache[:, :, first:slot] = random.numbers(
            sequences, shape.kv_heads, attended - 1, shape.head_dim, dtype=torch.float32
        )
    mask = random.numbers(masked, attended) > 0 if masked else None
    if mask is not None:
        mask[:, -1] = True
    place = Cached(*(cache.to(cache_dtype) for cache in caches), first, slot, mask)
    turns = (random.numbers(rows, 1, turned), random.numbers(rows, 1, turned))
    return Step(shape, norms, projections, random.numbers(sequences, 1, width), turns, place)


def product(projection, x):
    bias = 0 if projection.bias is None else projection.bias.double()
    return x @ projection.weight.dense().double().T + bias


def products(projections, x, rows):
    """Of weights apart, or of one that has all rows."""
    outputs = torch.cat([product(projection, x) for projection in projections if projection.weight is not None], dim=-1)
    return outputs.split(rows, dim=-1)


def normed(norm, x):
    if norm.weight is None:
        return x
    return x * (x.square().mean(-1, keepdim=True) + norm.epsilon).rsqrt() * (norm.offset + norm.weight.double())


def turned(x, cosines, sines):
    """The first numbers of heads [sequences, heads, head_dim] are turned, the others stay."""
    size = cosines.shape[-1]
    x, rest = x[..., :size], x[..., size:]
    crossed = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1)
    return torch.cat([x * cosines.double() + crossed * sines.double(), rest], dim=-1)


def truth_of(step):
    """The outputs, the new keys and the new values, in float64."""
    shape, place = step.shape, step.place
    heads, kv_heads, size = shape.heads, shape.kv_heads, shape.head_dim
    attention, attention_out, mlp, mlp_out, of_query, of_key = step.norms
    x = step.inputs[:, 0].double()
    made = products(step.projections[:3], normed(attention, x), [heads * size, kv_heads * size, kv_heads * size])
    q, k, v = (part.unflatten(-1, (-1, size)) for part in made)
    q, k = turned(normed(of_query, q), *step.rotary), turned(normed(of_key, k), *step.rotary)
    attended = []
    for cache, new in ((place.keys, k), (place.values, v)):
        whole = cache[:, :, place.first : place.slot + 1].clone()
        whole[:, :, -1] = new
        attended.append(whole.double().repeat_interleave(heads // kv_heads, dim=1))
    scores = shape.scaling * (attended[0] @ q[..., None])[..., 0]
    if place.mask is not None:
        scores = scores.masked_fill(~place.mask[:, None], -torch.inf)
    mixed = (scores.softmax(-1)[:, :, None] @ attended[1]).flatten(1)
    h = x + normed(attention_out, product(step.projections[3], mixed))
    gate, up = products(step.projections[4:6], normed(mlp, h), [shape.intermediate] * 2)
    active = functional.silu(gate) if shape.activation == "silu" else functional.gelu(gate, approximate="tanh")
    return (h + normed(mlp_out, product(step.projections[6], active * up)))[:, None], k, v


def assert_right(step, name, tolerance=1e-3):
    """Relative to what the block adds to each sequence; what is stored is rounded besides. Returns the outputs."""
    outputs, keys, values = truth_of(step)
    ran = step.with_own_cache()
    given = ran.run(name)
    assert given.dtype == step.inputs.dtype
    step_size = torch.finfo(step.place.keys.dtype).eps
    tolerance += step_size if step.place.keys.dtype != torch.float32 else 0
    error, added = (given.double() - outputs).norm(dim=-1), (outputs - step.inputs.double()).norm(dim=-1)
    assert (error <= tolerance * added + 0.51 * torch.finfo(given.dtype).eps * outputs.norm(dim=-1)).all(), name
    for before, after, new in ((step.place.keys, ran.place.keys, keys), (step.place.values, ran.place.values, values)):
        slot = after[:, :, step.place.slot].double()
        largest = new.norm(dim=-1).amax(1, keepdim=True)
        assert ((slot - new).norm(dim=-1) <= (tolerance + step_size) * largest).all(), name
        assert_only_the_slot_differs(before, after, step.place.slot)
    return given


def assert_only_the_slot_differs(before, after, slot):
    before, after = (cache.view(INTEGERS[cache.dtype]).clone() for cache in (before, after))
    before[:, :, slot] = after[:, :, slot] = 0
    assert torch.equal(before, after), "written beside the slot"


@st.composite
def choices(draw):
    def lanes(most):
        return 16 * draw(st.integers(1, most))

    kv_heads, head_dim, sequences = draw(st.integers(1, 3)), lanes(6), draw(st.integers(1, 8))
    activation = draw(st.sampled_from(sorted(kernel.ACTIVATIONS)))
    shape = BlockShape(
        lanes(10), lanes(14), kv_heads * draw(st.integers(1, 3)), kv_heads, head_dim, activation, head_dim**-0.5
    )
    kind = Kind(
        bits=draw(st.integers(2, 6)),
        rotated=draw(st.sampled_from([0, 0, 1, 8, 256])),
        joined=(draw(st.booleans()), draw(st.booleans())),
        bias=draw(st.booleans()),
        behind=draw(st.booleans()),
        head_norms=draw(st.booleans()),
        offset=draw(st.sampled_from([0.0, 1.0])),
    )
    return {
        "seed": draw(st.integers(0, 2**31)),
        "shape": shape,
        "kind": kind,
        "dtype": draw(st.sampled_from(FLOATS)),
        "cache_dtype": draw(st.sampled_from(FLOATS)),
        "sequences": sequences,
        "first": draw(st.integers(0, 3)),
        "attended": draw(st.integers(1, 40)),
        "spare": draw(st.integers(0, 3)),
        "rotary": (draw(st.sampled_from([1, sequences])), draw(st.sampled_from([head_dim, head_dim // 2, 2, 0]))),
        "masked": draw(st.sampled_from([0, 1, sequences])),
    }


@given(choices())
def test_every_instruction_set_equals_the_definition(chosen):
    step = random_step(**chosen)
    for name in SETS:
        assert_right(step, name)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("cache_dtype", FLOATS)
def test_long_contexts(name, cache_dtype):
    assert_right(random_step(cache_dtype=cache_dtype, attended=600, masked=2), name)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_scores_that_overflow_an_exponential(name, factor):
    """Nearly all weight is on one token of each head, and e^score of it is beyond float32."""
    step = random_step(kind=Kind(head_norms=True), attended=50)
    step.norms[4].weight.mul_(factor)
    assert assert_right(step, name).isfinite().all()


@pytest.mark.parametrize("name", SETS)
def test_attention_to_nothing_but_the_new_token(name):
    step = random_step(attended=20, masked=2)
    step.place.mask[:, :-1] = False
    assert_right(step, name)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("activation", sorted(kernel.ACTIVATIONS))
def test_gates_that_are_far_out(name, activation):
    """Where e^gate overflows or vanishes, the activation is the gate itself or 0."""
    step = random_step(shape=replace(SMALL, activation=activation))
    step.projections[4].weight.scales.mul_(1000)
    assert assert_right(step, name).isfinite().all()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("sequences", [1, 4])
def test_threads_do_not_change_a_bit(name, sequences):
    shape = BlockShape(128, 640, 4, 2, 32, "silu", 0.2)
    step = random_step(shape=shape, sequences=sequences)
    weights = [projection.weight.spec for projection in step.projections]
    assert sum(spec.out_features * spec.in_features for spec in weights) > 2.5 * 100_000, "too few for three threads"
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(5):
                own = step.with_own_cache()
                outputs, slot = own.run(name), own.place.slot
                runs.append(
                    torch.cat(
                        [outputs.flatten(), *(c[:, :, slot].flatten() for c in (own.place.keys, own.place.values))]
                    )
                )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("sequences", [1, 3, 8])
def test_what_is_not_finite_is_not_rotated(name, value, sequences):
    step = random_step(sequences=sequences)
    step.inputs[sequences // 2, 0, 5] = value
    own = step.with_own_cache()
    assert own.run(name) is None
    for before, after in ((step.place.keys, own.place.keys), (step.place.values, own.place.values)):
        assert_only_the_slot_differs(before, after, step.place.slot)


@pytest.mark.parametrize("name", SETS)
def test_an_overflow_on_the_way_is_not_rotated(name):
    """The inputs are finite, those of the last product are not."""
    step = random_step()
    step.norms[2].weight.fill_(1e30)
    assert step.run(name) is None


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_sequence(name, value):
    step = random_step(kind=Kind(rotated=0), sequences=3)
    expected = step.with_own_cache().run(name)
    step.inputs[1, 0, 5] = value
    outputs = step.run(name)
    assert outputs[1].isnan().any()
    torch.testing.assert_close(outputs[[0, 2]], expected[[0, 2]], rtol=1e-3, atol=1e-3)


def without(step, index):
    return replace(step, projections=[Projection() if i == index else part for i, part in enumerate(step.projections)])


def with_shape(step, **changes):
    return replace(step, shape=replace(step.shape, **changes))


def with_rotary(step, size):
    return replace(step, rotary=(torch.ones(2, 1, size),) * 2)


REFUSED = {
    "heads that kv_heads do not divide": lambda step: random_step(shape=replace(SMALL, kv_heads=3)),
    "no kv_heads": lambda step: with_shape(step, kv_heads=0),
    "other heads than the weights have": lambda step: with_shape(step, heads=2),
    "a width that is no multiple of 16": lambda step: random_step(shape=replace(SMALL, hidden=56)),
    "an MLP of no multiple of 16": lambda step: random_step(shape=replace(SMALL, intermediate=56)),
    "another width than the weights have": lambda step: with_shape(step, hidden=48),
    "another width of the MLP": lambda step: with_shape(step, intermediate=48),
    "nothing in the MLP": lambda step: with_shape(step, intermediate=0),
    "heads of 24": lambda step: random_step(shape=replace(SMALL, head_dim=24)),
    "heads of nothing": lambda step: with_shape(step, head_dim=0),
    "no key": lambda step: without(step, 1),
    "no output of attention": lambda step: without(step, 3),
    "no up": lambda step: without(step, 5),
    "no down": lambda step: without(step, 6),
    "a first token before the first": lambda step: step.with_place(first=-1),
    "a slot before the first token": lambda step: step.with_place(slot=1),
    "more turned than there is": lambda step: with_rotary(step, 32),
    "an odd number of turned": lambda step: with_rotary(step, 15),
    "no sequence": lambda step: replace(step, inputs=step.inputs[:0]),
    "nine sequences": lambda step: replace(step, inputs=step.inputs[:1].repeat(9, 1, 1)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_c_would_misread_is_refused(why):
    step = random_step()
    assert step.with_own_cache().run("portable") is not None
    with pytest.raises(RuntimeError, match="refused its arguments"):
        REFUSED[why](step).run("portable")


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setitem(native.INSTRUCTION_SETS, "none", 99)
    with pytest.raises(RuntimeError, match="refused its arguments"):
        random_step().run("none")


def test_unknown_activations_have_no_number():
    with pytest.raises(KeyError):
        random_step(shape=replace(SMALL, activation="relu")).run("portable")
