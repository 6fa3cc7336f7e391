"""Blocks one behind the other in one call: what each gives by itself."""

from dataclasses import replace

import pytest
import torch

from slablm.runtime.kernels import block as kernel
from slablm.runtime.kernels.block import BlockShape
from tests.runtime.kernels.test_block import FLOATS, INTEGERS, LIBRARY, SETS, SMALL, random_step

pytestmark = pytest.mark.skipif(not SETS, reason="no compiled kernels")


def blocks_behind_each_other(count=3, **choices):
    """Steps of the same sequences and positions, each with a cache of its own."""
    steps = [random_step(seed, **choices) for seed in range(count)]
    return [replace(step, rotary=steps[0].rotary, inputs=steps[0].inputs) for step in steps]


def run_together(name, steps):
    blocks, places = zip(*(step.described() for step in steps), strict=True)
    return kernel.run(LIBRARY, name, b"".join(blocks), steps[0].inputs, steps[0].rotary, places, steps[0].place.mask)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks_together_are_blocks_one_by_one(name, dtype):
    """To the bit, rounding to 16 bits between them included; with other weights and widths of the MLP each."""
    steps = blocks_behind_each_other(dtype=dtype, shape=BlockShape(64, 640, 4, 2, 16, "silu", 0.25))
    steps[1] = replace(
        random_step(9, dtype=dtype, shape=BlockShape(64, 96, 6, 3, 32, "gelu_tanh", 0.2)), rotary=steps[0].rotary
    )
    together, alone = (
        [step.with_own_cache() for step in steps],
        [step.with_own_cache() for step in steps],
    )
    states = steps[0].inputs
    for own, outputs in zip(alone, run_together(name, together), strict=True):
        states = replace(own, inputs=states).run(name)
        assert torch.equal(outputs, states)
    for one, other in zip(together, alone, strict=True):
        for cache, expected in ((one.place.keys, other.place.keys), (one.place.values, other.place.values)):
            assert torch.equal(cache.view(INTEGERS[cache.dtype]), expected.view(INTEGERS[cache.dtype]))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("at", [0, 2])
def test_blocks_together_end_where_one_is_not_finite(name, at):
    steps = blocks_behind_each_other()
    steps[at].norms[2].weight.fill_(1e30)
    assert run_together(name, steps) is None


def test_blocks_of_other_widths_are_refused():
    steps = [random_step(), replace(random_step(shape=replace(SMALL, hidden=80)), rotary=random_step().rotary)]
    with pytest.raises(RuntimeError, match="refused its arguments"):
        run_together("portable", steps)
