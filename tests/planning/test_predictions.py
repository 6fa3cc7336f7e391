"""Predictions beside what `compress` then does, and beside sizes worked out by hand."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm import CompressionConfig, SlabError, plan
from slablm.api import compress_folder
from slablm.calibration.statistics import SAMPLED_TOKENS
from slablm.compression.options import RunOptions
from slablm.methods import METHODS, LayerStats, RowBudget, SymbolBudget, SymbolWeight, storage
from slablm.planning import checks
from slablm.planning.timing import busiest_share
from slablm.system.distributed import World
from tests.compression.folders import build
from tests.compression.test_architectures import FAMILIES

DATA = Path(__file__).parent.parent / "data"
PACKABLE = [name for name, method in METHODS.items() if method.packable]


def planned(source, config, out="out", **options):
    return plan(str(source), config, options=RunOptions(**options), out=out, measure_speed=False)


def assert_exact(source, config, out, **options):
    prediction = planned(source, config, out, **options)
    assert prediction.problems == ()
    compress_folder(str(source), out, config, RunOptions(**options))
    files = sorted(out.glob("*.safetensors"))
    size = prediction.outlook.size
    assert (size.files, size.file_bytes) == (len(files), sum(file.stat().st_size for file in files))
    whole = sum(file.stat().st_size for file in out.iterdir())
    assert prediction.outlook.disk.result_bytes == pytest.approx(whole, rel=0.01)
    assert whole <= prediction.outlook.disk.needed_bytes
    return prediction


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_every_family_are_exact(family, quick, tmp_path):
    source = build(tmp_path / "dense", family)
    assert_exact(source, quick, tmp_path / "out", max_shard_size=60_000)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_with_a_head_in_8_bits_are_exact(family, quick, tmp_path):
    source = build(tmp_path / "dense", family)
    plain, prediction = (
        planned(source, quick),
        assert_exact(source, replace(quick, head_bits=8), tmp_path / "out", max_shard_size=60_000),
    )
    size, before = prediction.outlook.size, plain.outlook.size
    assert (size.head_bits, before.head_bits, prediction.to_dict()["head_bits"]) == (8, 16, 8)
    assert size.dense_bytes == before.dense_bytes
    assert [layer.true_bits for layer in size.layers] == [layer.true_bits for layer in before.layers]
    assert size.bits_per_weight == pytest.approx(before.bits_per_weight, rel=0.1)  # headers have more names
    matrices = 1 if before.stored.keys().isdisjoint({"lm_head.weight", "embed_out.weight"}) else 2
    assert sum(before.stored.values()) - sum(size.stored.values()) == matrices * 258 * (64 - 2)


def test_a_head_in_8_bits_that_cannot_be_is_a_problem(tiny_folder, quick, monkeypatch):
    class Odd(torch.nn.Linear):
        pass

    planning_plan = importlib.import_module("slablm.planning.plan")
    original = planning_plan.open_skeleton

    def odd_skeleton(*args, **kwargs):
        skeleton = original(*args, **kwargs)
        skeleton.model.lm_head.__class__ = Odd
        return skeleton

    monkeypatch.setattr(planning_plan, "open_skeleton", odd_skeleton)
    assert planned(tiny_folder, quick).problems == ()
    (problem,) = planned(tiny_folder, replace(quick, head_bits=8)).problems
    assert problem.startswith("lm_head has class Odd, ")
    assert problem.endswith("use --head-bits 16")


@pytest.mark.parametrize("method", PACKABLE)
def test_sizes_of_every_method_are_exact(method, tiny_folder, quick, tmp_path):
    size = {"ratio": None, "bits_per_weight": 9.0} if method == "slab+" else {"ratio": 0.2, "rank": 2}
    config = replace(quick, method=method, **size)
    prediction = assert_exact(tiny_folder, config, tmp_path / "out")
    from slablm.checkpoint.inspection import inspect_folder

    inspection = inspect_folder(tmp_path / "out")
    assert prediction.outlook.size.bits_per_weight == inspection.bits_per_weight
    assert prediction.outlook.size.compression_ratio == pytest.approx(inspection.compression_ratio)


def test_a_budget_in_true_bits_is_used_up(tiny_folder, quick_plus, tmp_path):
    """Which layers get more bits depends on the weights; never do they take more than the budget together."""
    prediction = planned(tiny_folder, quick_plus)
    compress_folder(str(tiny_folder), tmp_path / "out", quick_plus, RunOptions())
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert prediction.outlook.size.file_bytes == pytest.approx(written, rel=0.02)


def test_a_budget_that_is_too_small_is_said_before(tiny_folder, quick_plus):
    found = planned(tiny_folder, replace(quick_plus, bits_per_weight=2.3))
    assert found.outlook is None
    assert any("2.3 bits per weight are too few: use at least" in problem for problem in found.problems)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_with_a_pattern_ignored_layers_and_other_types(dtype, tiny_folder, quick, tmp_path):
    config = replace(quick, pattern="2:4", ignore=("k_proj",), value_dtype="bfloat16")
    prediction = assert_exact(tiny_folder, config, tmp_path / "out", dtype=dtype)
    assert prediction.targets.left_dense["model.layers.1.self_attn.k_proj"] == "ignored by 'k_proj'"


@given(
    st.sampled_from(PACKABLE),
    st.integers(20, 60),
    st.integers(5, 15),
    st.integers(1, 3),
    st.sampled_from(["unstructured", "2:4"]),
)
def test_a_methods_budget_is_what_it_stores(method, m, groups, rank, pattern):
    settings = {"ratio": 0.3, "rank": rank, "pattern": pattern}
    config = CompressionConfig(method=method, iterations=2, **({} if method == "slab+" else settings))
    weight = torch.randn(m, 4 * groups, generator=torch.Generator().manual_seed(m))
    gram = torch.eye(4 * groups)
    stats = LayerStats(torch.ones(4 * groups), 1, torch.empty(0, 4 * groups), gram, gram)
    try:
        result = METHODS[method].function(weight, stats, config)
    except SlabError:
        with pytest.raises(SlabError, match="keeps no entry|are too few"):
            storage((m, 4 * groups), config)
        return
    if isinstance(result, SymbolWeight):
        stored = SymbolBudget(result.symbol_bits)
    else:
        stored = RowBudget(result.kept, result.rank, result.signs is not None)
    assert storage((m, 4 * groups), config) == stored


# Published shapes: hidden, intermediate, blocks, heads, key/value heads, vocabulary, tied.
PUBLISHED = {
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, False),
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128256, False),
}
PARAMETERS = {"llama-3.2-1b": 1_235_814_400, "llama-3-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name, monkeypatch):
    """Sizes are worked out by hand: 16-bit values, factors and dense matrices, 5 states to a byte."""
    monkeypatch.setattr(checks, "free_bytes", lambda out: 10**12)
    hidden, intermediate, blocks, heads, kv_heads, vocabulary, tied = PUBLISHED[name]
    kv = hidden // heads * kv_heads
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    shapes += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    packed = 0
    for m, n in shapes:
        kept = int((1 - 0.5 - 1 / 16 - (m + n) / (m * n)) * n)
        packed += 2 * m * kept + 2 * (m + n) + m * ((n + 4) // 5)
    dense = 2 * (vocabulary * hidden * (1 if tied else 2) + hidden * (2 * blocks + 1))
    prediction = planned(DATA / name, CompressionConfig("slab", num_samples=8))
    size = prediction.outlook.size
    assert size.file_bytes - size.header_bytes == blocks * packed + dense
    assert size.header_bytes < 0.002 * size.file_bytes
    assert size.dense_bytes == 2 * PARAMETERS[name]
    assert len(prediction.to_dict()["layers"]) == 7 * blocks
    # One block at a time: its weights, and nothing that grows with the depth.
    parts = {part.name: part.bytes for part in prediction.outlook.memory.largest.parts}
    assert parts["one block"] == 2 * (sum(m * n for m, n in shapes) + 2 * hidden)
    assert (
        parts["hidden states of all windows"] == 12 * 2048 * hidden * 2
    )  # two windows calibrate nothing, and count twice
    json.dumps(prediction.to_dict())


def test_ranks_have_their_share(monkeypatch):
    """Of windows, statistics and time. In a block of Llama-3.1-70B down_proj is more than half of the work, and most
    statistics are those of its inputs: one rank has them alone, and the others have to wait.
    """
    monkeypatch.setattr(checks, "free_bytes", lambda out: 10**12)
    config = CompressionConfig("slab+", num_samples=30)
    alone, four, eight = (
        planned(DATA / "llama-3.1-70b", config, world=World(size=ranks)).outlook for ranks in (1, 4, 8)
    )

    def part(outlook, name):
        parts = [part for phase in outlook.memory.phases for part in phase.parts]
        return max(part.bytes for part in parts if part.name == name)

    states = "hidden states of all windows"
    assert part(four, states) == part(alone, states) * 10 // 34  # 8 windows, 2 of them twice
    down, hidden = (4 * (2 * n * n + 2 * SAMPLED_TOKENS * n) for n in (28672, 8192))
    assert part(alone, "statistics") == pytest.approx(down + 3 * hidden, rel=0.01)
    assert part(four, "statistics") == part(eight, "statistics") == pytest.approx(down, rel=0.01)
    shapes = [(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 2 + [(8192, 28672)]
    work = [m * n * n + n**3 / 2 for m, n in shapes]
    for outlook in (four, eight):
        share = busiest_share(outlook.rehearsal, outlook.size, "slab+", 4)
        assert share == pytest.approx(work[-1] / sum(work))
    assert busiest_share(alone.rehearsal, alone.size, "slab+", 1) == pytest.approx(1)


def test_more_ranks_than_windows(tiny_folder, quick):
    with pytest.raises(SlabError, match="4 calibration windows cannot be divided among 5 ranks"):
        planned(tiny_folder, quick, world=World(size=5))
    with pytest.raises(SlabError, match="among 16 ranks at most, not among 17"):
        planned(tiny_folder, replace(quick, num_samples=20), world=World(size=17))


def test_spilled_states_move_from_memory_to_disk(tiny_folder, quick):
    window = 32 * 64 * 4
    outlook = planned(tiny_folder, quick, max_memory=window).outlook
    assert outlook.disk.spilled_bytes == 7 * window
    states = [p.bytes for p in outlook.memory.largest.parts if p.name == "hidden states of all windows"]
    assert states in ([], [window])


IMPOSSIBLE = {
    "ratio": ({"ratio": 0.93}, r"q_proj: ratio 0\.93 keeps no entry .* use at most ratio 0\.\d+"),
    "pattern": ({"pattern": "5:7"}, "does not divide the 64 inputs"),
    "length": ({"seq_len": 4096}, "longer than the model's 128 positions"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_settings_are_problems(case, tiny_folder, quick):
    changes, message = IMPOSSIBLE[case]
    problems = planned(tiny_folder, replace(quick, **changes)).problems
    assert any(pytest.raises(SlabError, match=message).matches(SlabError(line)) for line in problems), problems


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("free_bytes", lambda out: 1000, "the disk has 1 kB free where OUT is to be"),
        ("machine_memory", lambda: 10**6, "this machine has 1 MB"),
    ],
)
def test_compress_checks_first(what, value, message, tiny_folder, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, what, value)
    assert len(planned(tiny_folder, quick).problems) == 1
    heard = []
    with pytest.raises(SlabError, match=message):
        compress_folder(str(tiny_folder), tmp_path / "out", quick, RunOptions(), say=heard.append)
    assert not any("Calibrating" in line for line in heard)
    assert list(tmp_path.iterdir()) == []


def test_what_an_unfinished_run_has_written_is_not_needed_again(tiny_folder, quick):
    outlook = planned(tiny_folder, quick).outlook
    tight = replace(outlook, disk=replace(outlook.disk, free_bytes=outlook.disk.needed_bytes - 10))
    (problem,) = tight.problems(torch.device("cpu"), present_bytes=9)
    assert problem.startswith("the disk has")
    assert tight.problems(torch.device("cpu"), present_bytes=10) == []


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(SlabError, match=r"holds no config\.json"):
        planned(tmp_path, CompressionConfig())


def test_a_compressed_model(compressed_folder):
    with pytest.raises(SlabError, match="already compressed"):
        planned(compressed_folder, CompressionConfig())


def test_the_parts_of_the_time(tiny_folder, quick):
    """No timings in tests, but the parts are there and count up."""
    duration = plan(str(tiny_folder), quick).duration
    assert duration.total == duration.calibration + duration.decomposition > 0
