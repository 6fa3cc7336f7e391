import pytest
import torch

from slablm.calibration import statistics
from slablm.calibration.statistics import Joint, StatsCollector, Use


def stats_of(collector):
    joint = Joint()
    for piece, value in collector.pieces().items():
        joint.add(0, piece, value)
    return joint.stats("layer", collector.tokens)


def test_statistics_are_those_of_all_inputs():
    collector = StatsCollector(6, with_gram=True, device=torch.device("cpu"))
    batches = [torch.randn(1, 5, 6), torch.randn(1, 7, 6)]
    for batch in batches:
        collector.add(batch, torch.tensor([0, 12, 3]))
    inputs = torch.cat([batch[0] for batch in batches])
    stats = stats_of(collector)
    assert stats.tokens == 12
    assert torch.allclose(stats.input_norms, inputs.norm(dim=0))
    assert torch.allclose(stats.gram, inputs.T @ inputs, atol=1e-5)
    assert torch.equal(stats.sample[1], batches[0][0, 12 % 5])


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 65])
def test_products_are_taken_in_strips_and_mirrored(n, monkeypatch):
    """Eight strips, fewer where they would be narrow; the last one shorter."""
    monkeypatch.setattr(statistics, "_NARROWEST", 3)
    collector = StatsCollector(n, with_gram=True, device=torch.device("cpu"))
    batches = [torch.randint(-8, 9, (1, 5, n)).float() for _ in range(3)]
    for leaf, batch in enumerate(batches):
        collector.add(batch, torch.tensor([0]), leaf=leaf // 2)
    inputs = torch.cat([batch[0] for batch in batches])
    assert torch.equal(stats_of(collector).gram, inputs.T @ inputs)


def test_products_of_bfloat16_are_those_of_float32(monkeypatch):
    """By a kernel if there is one, and without it; what else is kept is the same to the last bit."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 9, 300, generator=generator).bfloat16() for _ in range(3)]

    def collected(dtype):
        collector = StatsCollector(300, with_gram=True, device=torch.device("cpu"))
        for batch in batches:
            collector.add(batch.to(dtype), torch.tensor([0, 12, 3]))
        return stats_of(collector)

    wide, fast = collected(torch.float32), collected(torch.bfloat16)
    monkeypatch.setattr(statistics, "gram_kernel", lambda rows: None)
    without = collected(torch.bfloat16)
    assert torch.equal(without.gram, wide.gram)
    assert (fast.gram - wide.gram).norm() < 1e-6 * wide.gram.norm()
    for stats in (fast, wide):
        assert torch.equal(stats.gram, stats.gram.T)
    assert torch.equal(fast.input_norms, wide.input_norms)
    assert torch.equal(fast.sample, wide.sample)


def test_who_sees_all_windows_keeps_one_sum_of_those_that_are_fitted():
    """Once others come; and it is the same to the last bit."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(1, 9, 6, generator=generator) for _ in range(9)]
    grams = []
    for alone in (False, True):
        collector = StatsCollector(6, with_gram=True, device=torch.device("cpu"), alone=alone)
        for leaf, batch in enumerate(batches):
            collector.add(batch, torch.tensor([0]), leaf, Use.FIT if leaf < 7 else Use.HOLD_BACK)
        assert len(collector._sums[Use.FIT].nodes) == (1 if alone else 3)
        stats = stats_of(collector)
        grams.append((stats.gram, stats.held_out))
    assert all(map(torch.equal, *grams))


def test_the_first_token_counts():
    collector = StatsCollector(4, with_gram=False, device=torch.device("cpu"))
    inputs = torch.ones(1, 9, 4)
    inputs[0, 0] = 1000.0
    collector.add(inputs, torch.tensor([0]))
    assert (stats_of(collector).input_norms > 1000).all()


def test_statistics_accumulate_on_the_device():
    """Tensors on the meta device have no values: whoever asked for one would fail."""
    collector = StatsCollector(6, with_gram=True, device=torch.device("meta"))
    collector.add(torch.empty(1, 5, 6, dtype=torch.bfloat16, device="meta"), torch.tensor([0, 12, 3]))
    collector.add(torch.empty(1, 7, 6, dtype=torch.bfloat16, device="meta"), torch.tensor([0, 12, 3]))
    pieces = collector.pieces()
    assert {name: piece.device.type for name, piece in pieces.items()} == dict.fromkeys(
        ("sample", "unseen", "squares", "gram 0 0"), "meta"
    )
    assert pieces["sample"].shape == (6, 6)
