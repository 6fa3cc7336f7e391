"""A block is compared with its kernels before they run it."""

import logging

import pytest
import torch

from slablm.runtime import block_run
from slablm.runtime.kernels import native
from slablm.runtime.token_path import use_token_path
from tests.runtime.test_token_path import TOLERANCES, model_of, part_of

pytestmark = pytest.mark.skipif(isinstance(native.load(), str), reason="no compiled kernels")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("factor", [1e-4, 0])
def test_a_block_that_adds_next_to_nothing_takes_the_path(factor, dtype):
    model = model_of(dtype=dtype, num_hidden_layers=1)
    for name, part in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            part.scales.mul_(factor)
            part.bias.data.zero_()
    assert use_token_path(model) == 1


@pytest.mark.parametrize("part", ["outputs", "keys", "values"])
@pytest.mark.parametrize("value", [0.1, torch.nan])
def test_a_kernel_that_disagrees_is_not_used(part, value, monkeypatch, caplog):
    run, describe = block_run.kernel.run, block_run.kernel.describe_caches
    caches = {}

    def describe_and_keep(keys, values):
        caches.update(keys=keys, values=values)
        return describe(keys, values)

    def run_wrong(*arguments):
        outputs = run(*arguments)
        (caches | {"outputs": outputs[0]})[part][..., 0] += value
        return outputs

    model = model_of(num_hidden_layers=1)
    monkeypatch.setattr(block_run.kernel, "run", run_wrong)
    monkeypatch.setattr(block_run.kernel, "describe_caches", describe_and_keep)
    with caplog.at_level(logging.WARNING):
        assert use_token_path(model) == 0
    assert ["please report this" in record.message for record in caplog.records] == [True]
    assert "forward" not in vars(part_of(model))
