"""Counted and derived bytes beside those that torch's allocator really hands out."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from slablm import CompressionConfig
from slablm.calibration.capture import capture_block_calls
from slablm.calibration.statistics import SAMPLED_TOKENS
from slablm.dense.opening import empty_model
from slablm.dense.targets import find_blocks, select_targets
from slablm.methods import METHODS, LayerStats
from slablm.planning.memory import _SWEEP_MATRICES, _open_sums, workspace_per_weight
from slablm.planning.rehearsal import rehearse
from tests.conftest import tiny_config


def real_peak(work):
    """Most bytes that are allocated at a time while `work` runs, what operators take inside included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"ratio": 0.8}, {"rank": 3}, {"pattern": "2:4"}])
@pytest.mark.parametrize("method", ["slab", "wanda", "magnitude", "sparse+scalar-binary"])
def test_workspace_of_a_decomposition(method, settings, dtype):
    # Seeded: where two scores of a row are equal by chance, resolving that takes more.
    weight = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    stats = LayerStats(torch.ones(1000), 1, torch.empty(0, 1000))
    config = CompressionConfig(method=method, iterations=2, **settings)
    results = []
    peak = real_peak(lambda: results.append(METHODS[method].function(weight, stats, config)))
    expected = workspace_per_weight(method, results[0].kept / 1000, float32=dtype == torch.float32)
    assert peak == pytest.approx(expected * weight.numel(), rel=0.08)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_rehearsal_counts_what_a_block_takes(dtype):
    from transformers import LlamaForCausalLM

    config = tiny_config(hidden_size=128, intermediate_size=384, max_position_embeddings=512, dtype=dtype)
    skeleton = empty_model(config, dtype)
    targets = select_targets(skeleton, CompressionConfig())
    cpu = torch.device("cpu")
    (block,) = rehearse(skeleton, targets, 512, (SAMPLED_TOKENS, 32), cpu, grams=1).blocks
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert block.count == 2

    model = LlamaForCausalLM(config).to(dtype).eval()
    _, blocks = find_blocks(model)
    hidden, calls = capture_block_calls(model, blocks, torch.zeros(1, 512, dtype=torch.long), cpu)
    assert block.weight_bytes == sum(p.nbytes for p in blocks[0].parameters())
    assert real_peak(lambda: calls[0](blocks[0], hidden[0])) == pytest.approx(block.propagation.peak_bytes, rel=0.1)

    exact = 2 * 4 * 128**2 + 4 * 384**2 + 4 * (SAMPLED_TOKENS + 32) * (3 * 128 + 384)
    assert block.gram_bytes == 4 * (3 * 128**2 + 384**2)
    exact += 4 * 128**2 + 8 * (3 * 128 + 384)  # three distinct inputs of 128, one of 384
    assert block.statistics.left_bytes == pytest.approx(exact, rel=0.01)


def test_gram_matrices_on_the_way():
    """66 windows in 16 leaves: after 15 there are 4 sums, and the last one. Or 56 windows, in 14 leaves, are fitted: 1
    sum; then the rest of leaf 13, which has no sibling, leaf 14, and the last one. Of four ranks, with 4 leaves each,
    the third holds two sums and forms one more; the last one has one of leaves 12 and 13, and as many as before.
    """
    for method, alone, four in (("slab", 0, 0), ("sparsegpt", 4 + 1 - 1, 2 + 1 - 1), ("slab+", 1 + 3 - 2, 1 + 3 - 2)):
        config = CompressionConfig(method, num_samples=64)
        assert (_open_sums(config, 1), _open_sums(config, 4)) == (alone, four)


def test_more_windows_need_no_more_gram_matrices():
    """Than the buffers of a sweep, with which the peak comes."""
    assert max(_open_sums(CompressionConfig("slab+", num_samples=n), 1) for n in range(1, 600)) < _SWEEP_MATRICES


@torch.no_grad()
def test_products_are_counted():
    skeleton = empty_model(tiny_config(), torch.float32)
    targets = select_targets(skeleton, CompressionConfig())
    (block,) = rehearse(skeleton, targets, 128, (8, 8), torch.device("cpu"), grams=0).blocks
    weights = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96
    assert block.propagation.flops == 2 * 128 * weights + 4 * 128 * 128 * 64


@torch.no_grad()
def test_a_window_goes_into_one_gram_matrix():
    """A strip of it at a time, from the diagonal on: 128 rows, a narrower matrix at once."""
    skeleton = empty_model(tiny_config(intermediate_size=192), torch.float32)
    targets = select_targets(skeleton, CompressionConfig())
    runs = []
    for grams in (0, 1, 2):
        (block,) = rehearse(skeleton, targets, 128, (8, 8), torch.device("cpu"), grams=grams).blocks
        runs.append(block.statistics)
    inputs = (64, 64, 64, 192)  # of q, k and v; of o; of gate and up; of down
    entries = 3 * 64**2 + 128 * 192 + 64**2
    assert runs[1].flops - runs[0].flops == 2 * 128 * entries
    assert runs[2].flops == runs[1].flops
    assert runs[2].left_bytes - runs[1].left_bytes == sum(4 * n**2 + 8 * n for n in inputs)  # and the squares
