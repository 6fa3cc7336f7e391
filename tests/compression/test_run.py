"""Streamed compression: the same files as from a model in memory, whatever is cut or spilled."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from slablm import SlabError
from slablm.api import compress, compress_folder
from slablm.checkpoint.inspection import inspect_folder
from slablm.compression import blocks
from slablm.compression.options import RunOptions
from slablm.dense import loading, opening
from tests.compression.folders import NOTE, assert_same_folders, build, in_memory
from tests.compression.test_architectures import FAMILIES

# Its tensors have other names than the whole model's.
HEADLESS = "llama-tied headless"


@pytest.mark.parametrize("family", [*FAMILIES, HEADLESS])
def test_every_family_gives_the_same_files_as_in_memory(family, quick, tmp_path):
    source = build(tmp_path / "dense", family, max_shard_size="60KB")
    heard = []
    result = compress_folder(str(source), tmp_path / "streamed", quick, RunOptions(), say=heard.append)
    in_memory(source, tmp_path / "whole", quick)
    assert_same_folders(tmp_path / "streamed", tmp_path / "whole", NOTE)
    whole = [line for line in heard if line.startswith("The whole model is in memory: transformers changes the names")]
    assert len(whole) == (family == HEADLESS)
    assert result.dense_bytes == sum(p.nbytes for p in loading.load(str(source))[0].parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "streamed", "whole"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_in_8_bits_gives_the_same_files_as_in_memory(family, quick, tmp_path):
    source, config = build(tmp_path / "dense", family, max_shard_size="60KB"), replace(quick, head_bits=8)
    result = compress_folder(str(source), tmp_path / "streamed", config, RunOptions())
    in_memory(source, tmp_path / "whole", config)
    assert_same_folders(tmp_path / "streamed", tmp_path / "whole", NOTE)
    assert result.dense_bytes == sum(p.nbytes for p in loading.load(str(source))[0].parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_a_head_in_8_bits_of_every_type(stored, dtype, quick_plus, tmp_path):
    source, config = build(tmp_path / "dense", "gemma3_text", dtype=stored), replace(quick_plus, head_bits=8)
    compress_folder(str(source), tmp_path / "streamed", config, RunOptions(dtype=dtype, max_shard_size=60_000))
    in_memory(source, tmp_path / "whole", config, dtype, max_shard_size=60_000)
    assert_same_folders(tmp_path / "streamed", tmp_path / "whole", NOTE)


@torch.no_grad()
def test_a_head_in_8_bits_is_what_is_evaluated(tiny_folder, quick, tmp_path):
    """In memory, saved and loaded, streamed and loaded: the same logits; calibrated behind the same embedding."""
    config, tokens = replace(quick, head_bits=8), torch.arange(20)[None]
    model, tokenizer = loading.load(str(tiny_folder))
    compress(model, config, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "saved")
    compress_folder(str(tiny_folder), tmp_path / "streamed", config, RunOptions())
    for name in ("saved", "streamed"):
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens).logits, model(tokens).logits)
    compress_folder(str(tiny_folder), tmp_path / "plain", quick, RunOptions())
    plain = loading.load(str(tmp_path / "plain"))[0](tokens).logits
    assert 0 < (plain - model(tokens).logits).norm() / plain.norm() < 0.1
    sizes = [inspect_folder(tmp_path / name) for name in ("streamed", "plain")]
    assert sizes[0].layers[0].true_bits == sizes[1].layers[0].true_bits
    assert (
        sizes[1].file_bytes - sizes[0].file_bytes > 2 * 258 * 62 - 1000
    )  # two matrices of bytes, less scales, headers


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_every_type_gives_the_same_files_as_in_memory(stored, dtype, quick, tmp_path):
    source = build(tmp_path / "dense", "llama-tied", dtype=stored)
    compress_folder(str(source), tmp_path / "streamed", quick, RunOptions(dtype=dtype))
    in_memory(source, tmp_path / "whole", quick, dtype)
    assert_same_folders(tmp_path / "streamed", tmp_path / "whole", NOTE)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "wanda"},
        {"method": "sparse"},
        {"method": "sparse+scalar-binary"},
        {"method": "slab+", "ratio": None},
        {"method": "slab+", "ratio": None, "bits_per_weight": 5.0, "value_dtype": "bfloat16"},
    ],
)
def test_other_packed_forms(tiny_folder, settings, quick, tmp_path):
    config = replace(quick, ignore=("k_proj", "down_proj"), **settings)
    compress_folder(str(tiny_folder), tmp_path / "streamed", config, RunOptions())
    in_memory(tiny_folder, tmp_path / "whole", config)
    assert_same_folders(tmp_path / "streamed", tmp_path / "whole", NOTE)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_shards_in_and_out(family, quick, tmp_path):
    """However the tensors are divided into files, they are the same tensors."""
    one, many = build(tmp_path / "one" / "m", family), build(tmp_path / "many" / "m", family, max_shard_size="50KB")
    assert len(list(one.glob("*.safetensors"))) == 1
    assert len(list(many.glob("*.safetensors"))) > 3
    limit = 40_000
    compress_folder(str(one), tmp_path / "a", quick, RunOptions(max_shard_size=limit))
    compress_folder(str(many), tmp_path / "b", quick, RunOptions(max_shard_size=limit))
    cards = [path / "README.md" for path in (tmp_path / "a", tmp_path / "b")]
    assert cards[0].read_text() == cards[1].read_text()
    assert_same_folders(tmp_path / "a", tmp_path / "b")
    in_memory(one, tmp_path / "whole", quick, max_shard_size=limit)
    assert_same_folders(tmp_path / "a", tmp_path / "whole", NOTE)
    shards = list((tmp_path / "a").glob("model-*.safetensors"))
    assert len(shards) >= 3
    inspect_folder(tmp_path / "a")
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == loading.load(str(one))[0].num_parameters()
    tokens = torch.arange(9)[None]
    compress_folder(str(one), tmp_path / "single", quick, RunOptions())
    with torch.no_grad():
        logits = [loading.load(str(tmp_path / name))[0](tokens).logits for name in ("a", "single")]
    assert torch.equal(*logits)


def test_float16_on_a_cpu_is_told_to_be_slow(tiny_folder, quick, tmp_path):
    heard = {"float16": [], "bfloat16": []}
    for dtype, lines in heard.items():
        compress_folder(str(tiny_folder), tmp_path / dtype, quick, RunOptions(dtype=dtype), say=lines.append)
    slow = {dtype: [line for line in lines if "--dtype float32 is faster" in line] for dtype, lines in heard.items()}
    assert {dtype: len(lines) for dtype, lines in slow.items()} == {"float16": 1, "bfloat16": 0}


def test_spilled_activations_change_nothing(tiny_folder, quick, tmp_path):
    window_bytes = 32 * 64 * 4
    heard = []
    for name, limit in (("ram", None), ("half", 2 * window_bytes), ("file", 1)):
        options = RunOptions(max_memory=limit)
        compress_folder(str(tiny_folder), tmp_path / name, quick, options, say=heard.append)
    assert_same_folders(tmp_path / "ram", tmp_path / "half")
    assert_same_folders(tmp_path / "ram", tmp_path / "file")
    assert [line for line in heard if "hidden states" in line] == [
        "Memory for hidden states of all windows: 65.5 kB",
        "Memory for hidden states of all windows: 65.5 kB, all but 16.4 kB in a file",
        "Memory for hidden states of all windows: 65.5 kB, all but 1 B in a file",
    ]


def test_text_written_by_the_model_needs_the_whole_model(tiny_folder, quick, tmp_path):
    heard = []
    config = replace(quick, calibration="self", seq_len=16)
    compress_folder(str(tiny_folder), tmp_path / "streamed", config, RunOptions(), say=heard.append)
    assert "The whole model is in memory: it writes its own calibration text" in heard
    in_memory(tiny_folder, tmp_path / "whole", config)
    assert_same_folders(tmp_path / "streamed", tmp_path / "whole", NOTE)


def test_never_more_than_one_block_in_memory(quick, tmp_path, monkeypatch):
    """Counted at every decomposition: the parameters that have bytes."""
    source = build(tmp_path / "dense", "llama")
    model = loading.load(str(source))[0]
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    seen = []
    original = blocks.compress_layer

    def counting(*args):
        streamed = streamed_models[-1]
        seen.append(sum(t.nbytes for t in streamed.state_dict().values() if not t.is_meta))
        return original(*args)

    streamed_models = []
    skeleton = opening._skeleton

    def keeping(*args):
        opened = skeleton(*args)
        streamed_models.append(opened[0])
        return opened

    monkeypatch.setattr(opening, "_skeleton", keeping)
    monkeypatch.setattr(blocks, "compress_layer", counting)
    compress_folder(str(source), tmp_path / "out", quick, RunOptions())
    assert seen == [block] * 14
    assert all(t.is_meta for t in streamed_models[-1].state_dict().values())


def test_embedding_that_overflows_float16(quick, tmp_path):
    source = build(tmp_path / "dense", "llama")
    model = loading.load(str(source))[0]
    model.model.embed_tokens.weight.data[5, 5] = 1e6
    model.save_pretrained(source)
    with pytest.raises(SlabError, match=r"model\.embed_tokens\.weight: a value does not fit into torch.float16"):
        compress_folder(str(source), tmp_path / "out", quick, RunOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_a_model_in_the_hub_cache(quick, tmp_path, monkeypatch):
    """What was downloaded is streamed from the cache, sharded as it is there, without a network."""
    commit = "0123456789" * 4
    cached = tmp_path / "hub" / "models--owner--tiny"
    build(cached / "snapshots" / commit, "llama-tied", max_shard_size="60KB")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    heard = []
    compress_folder("owner/tiny", tmp_path / "streamed", quick, RunOptions(), say=heard.append)
    assert not any("whole model" in line for line in heard), heard
    in_memory("owner/tiny", tmp_path / "whole", quick)
    assert_same_folders(tmp_path / "streamed", tmp_path / "whole", NOTE)
    with pytest.raises(SlabError, match="model 'owner/other' cannot be loaded"):
        compress_folder("owner/other", tmp_path / "out", quick, RunOptions())


def test_blocks_without_a_target_are_passed_over(tiny_folder, quick_plus, tmp_path):
    config = replace(quick_plus, targets=("model.layers.1.mlp.up_proj",))
    compress_folder(str(tiny_folder), tmp_path / "out", config, RunOptions())
    assert [layer.name for layer in inspect_folder(tmp_path / "out").layers] == ["model.layers.1.mlp.up_proj"]
