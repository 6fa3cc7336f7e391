"""Streamed compression: the same files as from a model in memory, whatever is cut, spilled, killed or continued."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slablm import SlabError
from slablm.api import compress_folder, compress_model
from slablm.calibration.text import calibration_windows
from slablm.checkpoint import save
from slablm.checkpoint.card import model_card
from slablm.checkpoint.inspection import inspect_folder
from slablm.compression import blocks, run
from slablm.compression.journal import Journal
from slablm.compression.options import RunOptions
from slablm.dense import loading, opening
from slablm.dense.targets import select_targets
from slablm.system.distributed import World
from tests.compression.test_architectures import FAMILIES, SMALL
from tests.conftest import byte_tokenizer

# What a run notes beside its result, and a model that was in memory has nothing to say about.
NOTE = {save.RUN}


def in_memory(source, out, config, dtype="auto", max_shard_size="50GB"):
    """What the Python API writes: the truth here."""
    from slablm import __version__

    model, tokenizer = loading.load(str(source), dtype=dtype)
    targets = select_targets(model, config)
    reports = compress_model(model, targets, calibration_windows(model, tokenizer, config), config)
    settings = model.config.quantization_config.compression
    left_dense = targets.left_dense | blocks.unreached(targets, reports)
    card = model_card(str(source), settings, reports, left_dense, __version__)
    with save._staging(out) as folder:
        save._write_model(model, folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def assert_same_folders(a, b, besides=()):
    names = sorted(path.name for path in a.iterdir() if path.name not in besides)
    assert names == sorted(path.name for path in b.iterdir())
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def build(folder, family, **save_options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SMALL | {"vocab_size": 258} | FAMILIES[family]
    config = AutoConfig.for_model(family.removesuffix("-tied"), **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=save_options.pop("dtype", torch.float32))
    model.save_pretrained(folder, **save_options)
    byte_tokenizer().save_pretrained(folder)
    return folder


# transformers stores these under other names than the model's own.
RENAMED = {"gpt_neox"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_files_as_in_memory(family, quick, tmp_path):
    source = build(tmp_path / "dense", family, max_shard_size="60KB")
    heard = []
    result = compress_folder(str(source), tmp_path / "streamed", quick, RunOptions(), say=heard.append)
    in_memory(source, tmp_path / "whole", quick)
    assert_same_folders(tmp_path / "streamed", tmp_path / "whole", NOTE)
    whole = [line for line in heard if line.startswith("The whole model is in memory: transformers changes the names")]
    assert len(whole) == (family in RENAMED)
    assert result.dense_bytes == sum(p.nbytes for p in loading.load(str(source))[0].parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "streamed", "whole"]


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
        {"method": "slab+"},
        {"method": "slab+", "bits_per_weight": 4.0},
        {"method": "slab+", "bits_per_weight": 4.0, "refine": True},
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


def test_spilled_activations_change_nothing(tiny_folder, quick, tmp_path):
    window_bytes = 32 * 64 * 4
    heard = []
    for name, limit in (("ram", None), ("half", 2 * window_bytes), ("file", 1)):
        options = RunOptions(max_memory=limit)
        compress_folder(str(tiny_folder), tmp_path / name, quick, options, say=heard.append)
    assert_same_folders(tmp_path / "ram", tmp_path / "half")
    assert_same_folders(tmp_path / "ram", tmp_path / "file")
    assert [line for line in heard if "hidden states" in line] == [
        "Memory for hidden states of all windows: 49.2 kB",
        "Memory for hidden states of all windows: 49.2 kB, all but 16.4 kB in a file",
        "Memory for hidden states of all windows: 49.2 kB, all but 1 B in a file",
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
        streamed_models.append(skeleton(*args)[0])
        return streamed_models[-1], ""

    monkeypatch.setattr(opening, "_skeleton", keeping)
    monkeypatch.setattr(blocks, "compress_layer", counting)
    compress_folder(str(source), tmp_path / "out", quick, RunOptions())
    assert seen == [block] * 14
    assert all(t.is_meta for t in streamed_models[-1].state_dict().values())


class Stop(Exception):  # noqa: N818
    """The run is over here."""


def stop_after(layers):
    def on_layer(done, total, report):
        if done == layers:
            raise Stop

    return on_layer


def unfinished(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_resume_in_front_of_a_block_that_is_refined(tiny_folder, quick, tmp_path):
    config = replace(quick, refine=True)
    compress_folder(str(tiny_folder), tmp_path / "straight", config, RunOptions())
    with pytest.raises(Stop):
        compress_folder(str(tiny_folder), tmp_path / "out", config, RunOptions(), stop_after(10))
    result = compress_folder(str(tiny_folder), tmp_path / "out", config, RunOptions(resume=True))
    assert result.resumed_blocks == 1
    assert_same_folders(tmp_path / "out", tmp_path / "straight")
    compress_folder(str(tiny_folder), tmp_path / "plain", quick, RunOptions())
    errors = [[layer.output_error for layer in inspect_folder(tmp_path / name).layers] for name in ("plain", "out")]
    assert errors[0] != errors[1]


def test_several_ranks_do_not_refine(tiny_folder, quick, tmp_path):
    with pytest.raises(SlabError, match="--refine needs a single process, not 2 ranks"):
        compress_folder(
            str(tiny_folder), tmp_path / "out", replace(quick, refine=True), RunOptions(world=World(size=2))
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama-tied", "gpt_neox"])
@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_resume_gives_the_same_files(family, share, quick, tmp_path):
    """Stopped in the first block, in the second, and at the very end; streamed and from the whole model."""
    source = build(tmp_path / "dense", family)
    compress_folder(str(source), tmp_path / "straight", quick, RunOptions())
    layers = len(inspect_folder(tmp_path / "straight").layers)
    out, options = tmp_path / "out", RunOptions(resume=True)
    with pytest.raises(Stop):
        compress_folder(str(source), out, quick, options, stop_after(round(share * layers)))
    assert not out.exists()
    assert unfinished(tmp_path) == ([] if share < 0.5 else [".out.unfinished"])
    done = []
    result = compress_folder(str(source), out, quick, options, lambda count, total, report: done.append(count))
    assert result.resumed_blocks == (0 if share < 0.5 else 1)
    assert done == list(range(1, layers + 1))
    assert_same_folders(out, tmp_path / "straight")
    assert unfinished(tmp_path) == []


def stop_at(monkeypatch, owner, name, calls=1):
    """Make a function fail when it is called for the nth time."""
    original, count = getattr(owner, name), []

    def failing(*args, **kwargs):
        count.append(1)
        if len(count) == calls:
            raise Stop
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("moment", ["assembling", "before publishing", "publishing", "after publishing"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_stopped_at_the_end(moment, overwrite, tiny_folder, quick, tmp_path, monkeypatch):
    """All blocks are done; the result is on its way, over an older model or into a new folder."""
    compress_folder(str(tiny_folder), tmp_path / "straight", quick, RunOptions())
    out = tmp_path / "out"
    if overwrite:
        compress_folder(str(tiny_folder), out, replace(quick, ratio=0.3), RunOptions(max_shard_size=50_000))
        (out / "notes.txt").write_text("mine")
    options = RunOptions(overwrite=overwrite)
    with monkeypatch.context() as patch:
        if moment == "assembling":
            stop_at(patch, save, "write_tensors")
        elif moment == "before publishing":
            stop_at(patch, run, "publish")
        elif moment == "publishing":
            stop_at(patch, Path, "replace" if overwrite else "rename", 9 if overwrite else 1)
        else:
            stop_at(patch, Journal, "remove")
        with pytest.raises(Stop):
            compress_folder(str(tiny_folder), out, quick, options)
    assert unfinished(tmp_path) == [".out.unfinished"]
    with pytest.raises(SlabError, match="already holds a model|an unfinished run for .* continue it with --resume"):
        compress_folder(str(tiny_folder), out, quick, RunOptions())
    heard = []
    compress_folder(str(tiny_folder), out, quick, replace(options, resume=True), say=heard.append)
    assert "Going on after 2 finished blocks" in heard
    if overwrite:
        assert (out / "notes.txt").read_text() == "mine"
        (out / "notes.txt").unlink()
    assert_same_folders(out, tmp_path / "straight")
    assert unfinished(tmp_path) == []


def test_a_complete_result_has_nothing_to_resume(tiny_folder, quick, tmp_path):
    out, heard = tmp_path / "out", []
    compress_folder(str(tiny_folder), out, quick, RunOptions(resume=True))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    compress_folder(str(tiny_folder), out, quick, RunOptions(resume=True), say=heard.append)
    assert heard == [f"{out} is complete, there is nothing to go on with"]
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(SlabError, match="already holds a model"):
        compress_folder(str(tiny_folder), out, replace(quick, ratio=0.6), RunOptions(resume=True))


def test_a_model_that_appears_in_the_meantime_is_not_lost(tiny_folder, quick, tmp_path):
    out = tmp_path / "out"

    def appear(done, total, report):
        if done == total:
            shutil.copytree(tiny_folder, out)

    with pytest.raises(SlabError, match="already holds a model: .*; 2 finished blocks are kept, .*--resume"):
        compress_folder(str(tiny_folder), out, quick, RunOptions(), appear)
    assert_same_folders(out, tiny_folder)
    compress_folder(str(tiny_folder), out, quick, RunOptions(resume=True, overwrite=True))
    assert loading.is_compressed(str(out))


@pytest.fixture
def stopped(quick, tmp_path):
    """A run that was stopped after its first block: (model, target)."""
    source = build(tmp_path / "dense", "llama", max_shard_size="100KB")
    with pytest.raises(Stop):
        compress_folder(str(source), tmp_path / "out", quick, RunOptions(), stop_after(9))
    return source, tmp_path / "out"


def test_an_unfinished_run_is_not_thrown_away(stopped, quick, tmp_path):
    source, out = stopped
    with pytest.raises(SlabError, match=r"unfinished run for .*out is in .*\.out\.unfinished \(1 blocks are"):
        compress_folder(str(source), out, quick, RunOptions())
    assert (tmp_path / ".out.unfinished" / "block-00000.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ratio": 0.6}, r"setting ratio \(was 0\.5, is 0\.6\)"),
        ({"num_samples": 3}, r"setting num_samples \(was 4, is 3\), calibration tokens \("),
        ({"ignore": ("q_proj",)}, r"setting ignore \(was \[\], is \['q_proj'\]\)"),
    ],
)
def test_changed_settings_are_refused(stopped, quick, change, named):
    source, out = stopped
    with pytest.raises(SlabError, match=f"begun with another {named}.*: go back to that, or delete .*unfinished"):
        compress_folder(str(source), out, replace(quick, **change), RunOptions(resume=True))
    compress_folder(str(source), out, quick, RunOptions(resume=True))


def test_changed_text_model_and_machine_are_refused(stopped, quick, tmp_path, monkeypatch):
    source, out = stopped

    def refused(named, config=quick, options=RunOptions(resume=True)):  # noqa: B008
        with pytest.raises(SlabError, match=named) as caught:
            compress_folder(str(source), out, config, options)
        assert "finished blocks are kept" not in str(caught.value)

    text = Path(quick.calibration)
    original = text.read_bytes()
    text.write_bytes(b"Another beginning. " + original)
    refused(r"another calibration tokens \(was \w{16}, is \w{16}\)")
    text.write_bytes(original)
    refused(
        r"another dtype \(was torch.float32, is torch.bfloat16\)", options=RunOptions(resume=True, dtype="bfloat16")
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        refused(r"another number of threads \(was 1, is 77\)")
    shard = sorted(source.glob("model-*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    refused(r"another model \(was \w{16}, is \w{16}\): go back")


def test_a_damaged_block_is_done_again(quick, tmp_path):
    source, out = build(tmp_path / "dense", "llama"), tmp_path / "out"
    compress_folder(str(source), tmp_path / "straight", quick, RunOptions())
    with pytest.raises(Stop):
        compress_folder(str(source), out, quick, RunOptions(), stop_after(14))
    for name in ("block-00000", "outside-00001"):
        path = tmp_path / ".out.unfinished" / f"{name}.safetensors"
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    assert compress_folder(str(source), out, quick, RunOptions(resume=True)).resumed_blocks == 0
    assert_same_folders(out, tmp_path / "straight")


def test_errors_in_the_middle_say_what_is_kept(quick, tmp_path):
    source = build(tmp_path / "dense", "llama")
    model = loading.load(str(source))[0]
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(source)
    with pytest.raises(SlabError, match=r"NaN or Inf in model\.layers\.1\.mlp.*; 1 finished blocks are kept, "):
        compress_folder(str(source), tmp_path / "out", quick, RunOptions())
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("settings", [{"method": "slab+", "bits_per_weight": 5.0}, {"refine": True}])
def test_blocks_without_a_target_are_passed_over(settings, tiny_folder, quick, tmp_path):
    config = replace(quick, targets=("model.layers.1.mlp.up_proj",), **settings)
    compress_folder(str(tiny_folder), tmp_path / "out", config, RunOptions())
    assert [layer.name for layer in inspect_folder(tmp_path / "out").layers] == ["model.layers.1.mlp.up_proj"]
