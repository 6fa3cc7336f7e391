import copy
import threading
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from slablm import CompressionConfig
from slablm.calibration import stream
from slablm.calibration.capture import in_float32
from slablm.compression.store import BlockStore
from slablm.methods.drift import Drift
from slablm.system.distributed import ALONE, World
from tests import reference


@given(st.integers(1, 80), st.integers(0, 9), st.integers(1, 7))
def test_windows_held(calibrating, unseen, ranks):
    """All once, the unseen ones twice."""
    held = stream.windows_held(calibrating, unseen, ranks)
    assert len(held) == ranks
    assert sum(held) == calibrating + 2 * unseen
    assert stream.windows_held(calibrating, unseen) == [calibrating + 2 * unseen]


@dataclass(frozen=True)
class Threads(World):
    """Ranks that are threads of this process."""

    table: list | None = None
    barrier: threading.Barrier | None = None

    def gather(self, notes, tensors):
        self.table[self.rank] = (notes, tensors)
        self.barrier.wait(30)
        gathered = list(self.table)
        self.barrier.wait(30)
        return gathered


def changed(model):
    """The model with other weights in its blocks."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in other.model.layers.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return other


@torch.no_grad()
def walk(model, windows, config, world=ALONE, other=None):
    """The drift behind every block, when each becomes that of another model."""
    model = copy.deepcopy(model)
    calibration = stream.Calibration(model, model.model.layers, windows, config, BlockStore(), world)
    found = []
    for index, block in enumerate(model.model.layers):
        calibration.propagate_dense(index)
        if other is not None:
            block.load_state_dict(other.model.layers[index].state_dict())
        calibration.propagate(index)
        found.append(calibration.drift())
    return found


WINDOWS = torch.randint(3, 200, (9, 20), generator=torch.Generator().manual_seed(2))
TWO = CompressionConfig(num_samples=2)


@torch.no_grad()
def test_the_drift_is_that_of_the_unseen_windows(tiny_model):
    """Beside the plain forward of both models on those windows alone."""
    other = changed(tiny_model)
    found = walk(tiny_model, WINDOWS[:4], TWO, other=other)
    hidden = [
        [model(window[None], output_hidden_states=True).hidden_states[1][0] for window in WINDOWS[2:4]]
        for model in (tiny_model, other)
    ]
    assert (found[0].first, found[0].rest) == pytest.approx(reference.drift(*hidden), rel=1e-5)
    assert found[1].rest > found[0].rest  # errors add up: the second block has the first one's changes in its input


def test_what_is_not_changed_does_not_drift(tiny_model):
    assert walk(tiny_model, WINDOWS[:4], TWO) == [Drift(0.0, 0.0)] * 2


def test_without_unseen_windows_there_is_no_drift(tiny_model):
    assert walk(tiny_model, WINDOWS[:2], TWO, other=changed(tiny_model)) == [None, None]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_division_among_ranks_gives_the_same_drift(size, tiny_model):
    """Nine windows, seven of them unseen: some ranks have none, some have both kinds, some have unseen ones alone."""
    other, table, barrier, found = changed(tiny_model), [None] * size, threading.Barrier(size), [None] * size
    wanted = walk(tiny_model, WINDOWS, TWO, other=other)
    shares = [World(rank, size).share(len(WINDOWS)) for rank in range(size)]
    assert sum(share.stop > TWO.num_samples for share in shares) > 1

    def run(rank):
        torch.set_num_threads(1)
        found[rank] = walk(tiny_model, WINDOWS, TWO, Threads(rank, size, table=table, barrier=barrier), other)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * size
    assert all(drift.rest > 0 for drift in wanted)


def test_the_copies_calibrate_nothing(tiny_model):
    """Statistics of a block do not see them, and hidden states in a file are those in memory."""

    class Small(BlockStore):
        def activations(self, count):
            return stream.Activations(count, max_bytes=3 * 20 * 64 * 4)

    layers = {"up": tiny_model.model.layers[0].mlp.up_proj}
    blocks, found = tiny_model.model.layers, []
    for store in (BlockStore(), Small()):
        calibration = stream.Calibration(tiny_model, blocks, WINDOWS[:4], TWO, store, ALONE)
        with torch.no_grad():
            calibration.propagate_dense(0)
            found.append(calibration.stats(0, layers, {"up": 0})["up"])
    assert found[0].tokens == 2 * 20
    assert torch.equal(found[0].input_norms, found[1].input_norms)
    assert torch.equal(found[0].unseen, found[1].unseen)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_backward_pass_is_in_float32(dtype, tiny_model):
    """On a CPU 16-bit ones can take minutes per block; what the model calls blocks with is of its own type."""
    model = copy.deepcopy(tiny_model).to(dtype)
    block, before = model.model.layers[0], copy.deepcopy(model.model.layers[0].state_dict())
    calibration = stream.Calibration(model, model.model.layers, WINDOWS[:2], TWO, BlockStore(), ALONE)
    layers, seen = {"down": block.mlp.down_proj}, []
    block.self_attn.register_forward_hook(
        lambda module, args, kwargs, output: seen.extend([kwargs, output[0]]), with_kwargs=True
    )
    assert calibration.sensitivity(0, layers)["down"] > 0
    tensors = [value for value in tree_leaves(seen) if isinstance(value, torch.Tensor) and value.is_floating_point()]
    assert len(tensors) >= 2 * 4  # hidden states, cosines, sines and outputs of two probes
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    for name, tensor in block.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, before[name])


@torch.no_grad()
def test_what_fails_leaves_the_block_as_it_was(tiny_model):
    block = copy.deepcopy(tiny_model).half().model.layers[0]

    def fail():
        with in_float32(block):
            assert block.mlp.up_proj.weight.dtype == torch.float32
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert {tensor.dtype for tensor in block.state_dict().values()} == {torch.float16}
