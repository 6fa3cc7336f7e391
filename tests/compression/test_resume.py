"""Runs that were stopped, wherever it was, and are continued: the same files, and nothing of the user's lost."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slablm import SlabError
from slablm.api import compress_folder
from slablm.checkpoint import save
from slablm.checkpoint.inspection import inspect_folder
from slablm.compression import fingerprint, run
from slablm.compression.journal import Journal
from slablm.compression.options import RunOptions
from slablm.dense import loading
from tests.compression.folders import Stop, assert_same_folders, build, stop_after, unfinished


def test_resume_with_symbols(tiny_folder, quick_plus, tmp_path):
    compress_folder(str(tiny_folder), tmp_path / "straight", quick_plus, RunOptions())
    with pytest.raises(Stop):
        compress_folder(str(tiny_folder), tmp_path / "out", quick_plus, RunOptions(), stop_after(10))
    result = compress_folder(str(tiny_folder), tmp_path / "out", quick_plus, RunOptions(resume=True))
    assert result.resumed_blocks == 1
    assert_same_folders(tmp_path / "out", tmp_path / "straight")


@pytest.mark.parametrize("family", ["llama-tied", "llama-tied headless"])
def test_resume_with_a_head_in_8_bits(family, quick, tmp_path):
    source, config = build(tmp_path / "dense", family), replace(quick, head_bits=8)
    compress_folder(str(source), tmp_path / "straight", config, RunOptions())
    half = len(inspect_folder(tmp_path / "straight").layers) // 2 + 1
    out = tmp_path / "out"
    with pytest.raises(Stop):
        compress_folder(str(source), out, config, RunOptions(), stop_after(half))
    with pytest.raises(SlabError, match=r"begun with another setting head_bits \(was 8, is 16\)"):
        compress_folder(str(source), out, quick, RunOptions(resume=True))
    assert compress_folder(str(source), out, config, RunOptions(resume=True)).resumed_blocks == 1
    assert_same_folders(out, tmp_path / "straight")
    assert compress_folder(str(source), out, config, RunOptions(resume=True)).dense_bytes is None
    with pytest.raises(SlabError, match=r"made with another head_bits \(was 8, is 16\)"):
        compress_folder(str(source), out, quick, RunOptions(resume=True))


def test_a_run_goes_on_where_it_was_copied_to(quick, tmp_path):
    """Model, text and finished blocks: on other paths, with other dates."""
    here, there = tmp_path / "here", tmp_path / "there"
    source = build(here / "dense", "llama")
    shutil.copy(quick.calibration, here / "text.txt")
    with pytest.raises(Stop):
        compress_folder(
            str(source), here / "out", replace(quick, calibration=str(here / "text.txt")), RunOptions(), stop_after(10)
        )
    shutil.copytree(here, there, copy_function=shutil.copyfile)
    shutil.rmtree(here)
    config = replace(quick, calibration=str(there / "text.txt"))
    result = compress_folder(str(there / "dense"), there / "out", config, RunOptions(resume=True))
    assert result.resumed_blocks == 1
    compress_folder(str(there / "dense"), there / "straight", config, RunOptions())
    assert_same_folders(there / "out", there / "straight")


@pytest.mark.parametrize("family", ["llama-tied", "llama-tied headless"])
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
    with monkeypatch.context() as patch:  # a finished block may have been noted in another form
        patch.setattr(fingerprint, "READABLE_VERSIONS", (77,))
        refused(r"another format version \(was \d+, is 77\)")
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
