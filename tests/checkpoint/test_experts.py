"""Experts in files: what config.json says of them is checked, and FORMAT.md is enough to read them."""

import json
import shutil

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from slablm import CompressionConfig, SlabError, SlabLinear
from slablm.api import compress_folder
from slablm.checkpoint import places
from slablm.checkpoint.inspection import inspect_folder
from slablm.dense.loading import load
from slablm.runtime.experts import all_experts
from tests.checkpoint import second_reader
from tests.checkpoint.folders import edit_json
from tests.compression.mixtures import build

EXPERTS = [f"model.layers.{block}.mlp.experts" for block in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file):
    """Transposed experts with biases, one projection of which is left dense; do not write to it."""
    path = tmp_path_factory.mktemp("mixture")
    config = CompressionConfig(
        "slab", calibration=str(text_file), num_samples=2, seq_len=24, iterations=2, ignore=("experts.1.gate_proj",)
    )
    compress_folder(str(build(path / "dense", "gpt_oss")), path / "out", config)
    return path / "out"


def test_a_second_reader(folder):
    reader = second_reader.Reader(folder)
    assert reader.experts == EXPERTS
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, experts in all_experts(model):
        for number in range(4):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                layer = experts.get_submodule(f"{number}.{projection}")
                dense = (number, projection) == (1, "gate_proj")
                assert isinstance(layer, SlabLinear) == (not dense)
                expected = layer.weight if dense else layer.packed.dense()
                assert np.array_equal(reader.projection(name, number, projection), expected.float().numpy())
                assert np.array_equal(reader.numbers(f"{name}.{number}.{projection}.bias"), layer.bias.detach().numpy())
    assert not any("gate_up_proj" in name for name in reader.tensors)


ENTRIES = {
    "no list": (lambda q: q.update(experts=EXPERTS[0]), "experts is damaged: it is no list of names"),
    "empty": (lambda q: q.update(experts=[]), "experts is damaged: it is no list of names"),
    "no names": (lambda q: q.update(experts=[3]), "experts is damaged: 3 is no name of a module"),
    "twice": (lambda q: q.update(experts=EXPERTS[:1] * 2), "experts is damaged: .* is no name of a module"),
    "a compressed layer": (
        lambda q: q.update(experts=[f"{EXPERTS[0]}.0.up_proj"]),
        "experts.0.up_proj' is no name of a module, or has another entry",
    ),
    "before there were any": (lambda q: q.update(format_version=8), "it has experts, which format 8 has not"),
    "missing": (
        lambda q: q.pop("experts"),
        "experts or int8_rows of config.json is not what the files were written with",
    ),
    "too few": (
        lambda q: q["experts"].pop(),
        "experts or int8_rows of config.json is not what the files were written with",
    ),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_entries(case, folder, tmp_path):
    edit, match = ENTRIES[case]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    edit_json(copy / "config.json", lambda config: edit(config["quantization_config"]))
    for read in (inspect_folder, lambda path: load(str(path)), AutoModelForCausalLM.from_pretrained):
        with pytest.raises(SlabError, match=match) as info:
            read(copy)
        assert "\n" not in str(info.value)


def test_experts_that_the_model_has_not(folder, monkeypatch):
    """Another version of transformers may keep them in another way."""
    monkeypatch.setattr(places, "shares_of", lambda module: {})
    with pytest.raises(SlabError, match=f"config.json lists experts '{EXPERTS[0]}' that GptOssForCausalLM lacks"):
        load(str(folder))


def test_the_version_rises_with_experts_alone(folder, compressed_folder):
    for path, version in ((folder, 9), (compressed_folder, 8)):
        assert json.loads((path / "config.json").read_text())["quantization_config"]["format_version"] == version
        assert second_reader.Reader(path).record["format_version"] == version


def test_several_files(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(folder.parent / "dense")
    assert index["metadata"]["total_parameters"] == dense.num_parameters() == inspect_folder(folder).model_weights
    assert inspect_folder(tmp_path / "many").layers == inspect_folder(folder).layers
