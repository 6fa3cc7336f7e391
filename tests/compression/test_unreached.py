"""Layers that no calibration token reaches, such as an expert that is never chosen: they stay dense, with a reason."""

import warnings

import pytest
import torch
from torch import nn

from slablm import CompressionConfig, SlabError
from slablm.api import compress_folder
from slablm.calibration.capture import collect_stats
from slablm.calibration.statistics import Use
from slablm.checkpoint.inspection import inspect_folder
from slablm.compression.options import RunOptions
from slablm.dense import loading
from tests.compression.folders import NOTE, Stop, assert_same_folders, build, in_memory, stop_after


@pytest.fixture
def spare(monkeypatch):
    """Llama's MLPs with one linear layer more, which nothing is ever sent to."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    original = LlamaMLP.__init__

    def with_spare(self, config):
        original(self, config)
        self.spare = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    monkeypatch.setattr(LlamaMLP, "__init__", with_spare)


@torch.no_grad()
def statistics(windows, uses):
    """Of a layer that is sent these windows, each [tokens, 4]."""
    layer = nn.Linear(4, 4)
    run = lambda i: layer(windows[i])  # noqa: E731
    return collect_stats(layer, {"expert": layer}, run, uses, with_gram=True, seed=0).get("expert")


def test_a_call_with_no_token_counts_as_none():
    assert statistics([torch.empty(0, 4)], [Use.FIT]) is None
    assert statistics([torch.empty(0, 4), torch.ones(2, 4)], [Use.FIT] * 2).tokens == 2


@pytest.mark.parametrize("use", [Use.HOLD_BACK, Use.MEASURE])
def test_tokens_that_are_not_fitted_do_not_calibrate(use):
    assert statistics([torch.empty(0, 4), torch.ones(3, 4)], [Use.FIT, use]) is None


def test_a_layer_without_inputs_has_no_statistics():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, states):
            return self.used(states)

    block = Block()
    layers = {"used": block.used, "spare": block.spare}
    stats = collect_stats(block, layers, lambda i: block(torch.ones(1, 3, 4)), [Use.FIT], with_gram=False, seed=0)
    assert set(stats) == {"used"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"method": "slab+", "ratio": None, "bits_per_weight": 5.0}],
)
def test_it_stays_dense_and_the_rest_is_compressed(spare, settings, quick, tmp_path):
    source = str(build(tmp_path / "dense", "llama"))
    config = CompressionConfig(**(quick.to_dict() | settings))
    said = []
    compress_folder(source, tmp_path / "out", config, say=said.append)
    names = [f"model.layers.{i}.mlp.spare" for i in range(2)]
    assert [f"left dense: {name} (no calibration token reached it)" for name in names] == said[-2:]
    assert len(inspect_folder(tmp_path / "out").layers) == 14
    assert f"`{names[0]}` (no calibration token reached it)" in (tmp_path / "out" / "README.md").read_text()
    loaded, dense = loading.load(str(tmp_path / "out"))[0], loading.load(source)[0]
    for name in names:  # rounded as everything that stays dense
        assert torch.equal(loaded.get_submodule(name).weight.float(), dense.get_submodule(name).weight.half().float())


def test_the_files_equal_those_from_memory_also_after_a_stop(spare, quick, tmp_path):
    source = build(tmp_path / "dense", "llama")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        in_memory(source, tmp_path / "memory", quick)
    said = [str(warning.message) for warning in warned if warning.category is UserWarning]
    assert said == [f"left dense: model.layers.{i}.mlp.spare (no calibration token reached it)" for i in range(2)]
    with pytest.raises(Stop):
        compress_folder(str(source), tmp_path / "out", quick, on_layer=stop_after(10))
    resumed = compress_folder(str(source), tmp_path / "out", quick, RunOptions(resume=True))
    assert resumed.resumed_blocks == 1
    assert_same_folders(tmp_path / "out", tmp_path / "memory", besides=NOTE)


def test_nothing_that_a_token_reached(spare, quick, tmp_path):
    source = str(build(tmp_path / "dense", "llama"))
    config = CompressionConfig(**(quick.to_dict() | {"targets": ["mlp.spare"]}))
    with pytest.raises(SlabError, match="no calibration token reached any of the layers to compress"):
        compress_folder(source, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
