"""Saving is all or nothing, and never loses what the user has."""

import copy
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM

import slablm
from slablm import SlabError
from slablm.checkpoint import save
from slablm.checkpoint.inspection import inspect_folder
from tests.cli.test_faults import in_a_process


@pytest.fixture
def compressed(tiny_model, tokenizer, quick):
    return slablm.compress(tiny_model, quick, tokenizer=tokenizer)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_everything_and_no_leftovers(compressed, tokenizer, tmp_path):
    save.save(compressed, tokenizer, tmp_path / "deep" / "out", card="# card")
    files = listing(tmp_path / "deep" / "out")
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert listing(tmp_path / "deep") == ["out"]


def test_an_existing_model_needs_overwrite(compressed, tokenizer, tmp_path):
    out = tmp_path / "out"
    save.save(compressed, tokenizer, out)
    (out / "notes.txt").write_text("mine")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(SlabError, match="already holds a model: .* --overwrite"):
        save.save(compressed, tokenizer, out)
    save.save(compressed, tokenizer, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert (out / "notes.txt").read_text() == "mine"


def test_overwriting_removes_shards_of_the_old_model(compressed, tmp_path):
    out = tmp_path / "out"
    compressed.save_pretrained(out, max_shard_size="100KB")
    assert "model.safetensors.index.json" in listing(out)
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, compressed(tokens).logits)
    compressed.save_pretrained(out)
    assert [name for name in listing(out) if name.endswith((".safetensors", "index.json"))] == ["model.safetensors"]


def test_a_file_in_the_way(compressed, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SlabError, match="is a file, a folder is needed"):
        save.save(compressed, None, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_everything_as_it_was(compressed, tmp_path, monkeypatch, existing):
    out = tmp_path / "out"
    if existing:
        compressed.save_pretrained(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()} if existing else {}

    def no_space(*args, **kwargs):
        (args[1] / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(compressed), "save_pretrained", no_space)
    with pytest.raises(SlabError, match="nothing was changed there: the disk is full"):
        save.save_pretrained(compressed, out)
    assert listing(tmp_path) == (["out"] if existing else [])
    assert before == ({path.name: path.read_bytes() for path in out.iterdir()} if existing else {})


def test_a_really_full_disk(compressed, tmp_path):
    """The real thing where the system lets us limit the size of files: writing fails in the middle."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(SlabError, match="nothing was changed there"):
            compressed.save_pretrained(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert listing(tmp_path) == []


def test_a_kill_in_the_middle_leaves_no_model_and_is_cleaned_up(compressed, tmp_path):
    code = f"""
        import os, pathlib, signal
        from slablm.checkpoint import save
        with save.staged(pathlib.Path({str(tmp_path / "out")!r})) as folder:
            (folder / "model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(listing(tmp_path)) == 1
    compressed.save_pretrained(tmp_path / "out")
    assert listing(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_made(compressed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SlabError, match="cannot write to"):
        compressed.save_pretrained(tmp_path / "file" / "out")


def test_staging_of_a_living_process_is_left_alone(compressed, tmp_path):
    """Whoever holds the lock lives, whatever its number; without it the folder is what a dead process has left."""
    alive, dead = (tmp_path / f".out.partial-{name}" for name in ("1", "2"))
    for folder in (alive, dead):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    code = f"""
        from filelock import FileLock
        with FileLock({str(alive / "lock")!r}):
            print("locked", flush=True)
            input()
    """
    with in_a_process(code) as holder:
        assert holder.stdout.readline() == "locked\n"
        compressed.save_pretrained(tmp_path / "out")
        assert listing(tmp_path) == [".out.partial-1", "out"]
        holder.communicate("\n")
    compressed.save_pretrained(tmp_path / "out")
    assert listing(tmp_path) == ["out"]


def test_what_a_process_with_this_number_has_left_is_no_obstacle(compressed, tmp_path):
    """In a container the dead and the living are all process 1."""
    left = tmp_path / f".out.partial-{os.getpid()}"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    compressed.save_pretrained(tmp_path / "out")
    assert listing(tmp_path) == ["out"]


def test_what_a_kill_has_left_of_a_name_with_brackets(compressed, tmp_path):
    (tmp_path / ".out[1].partial-3").mkdir()
    compressed.save_pretrained(tmp_path / "out[1]")
    assert listing(tmp_path) == ["out[1]"]
    inspect_folder(tmp_path / "out[1]")


def test_a_folder_looks_as_others_do(compressed, tmp_path):
    (tmp_path / "plain").mkdir()
    compressed.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_only_the_main_process_writes(compressed, tmp_path):
    compressed.save_pretrained(tmp_path / "out", is_main_process=False)
    assert listing(tmp_path) == []
    compressed.save_pretrained(tmp_path / "out", True)
    inspect_folder(tmp_path / "out")


@pytest.mark.parametrize("max_shard_size", ["50GB", "100KB"])
def test_variants(compressed, tmp_path, max_shard_size):
    """Two sets of weights in one folder; each is read by its name, and saving one leaves the other."""
    out = tmp_path / "out"
    compressed.save_pretrained(out, variant="small", max_shard_size=max_shard_size)
    assert not any(name.startswith(("model.safetensors.index.json", "model-0")) for name in listing(out))
    with pytest.raises(SlabError, match="holds no safetensors files: its variants are small"):
        inspect_folder(out)
    alone = inspect_folder(out, variant="small")
    compressed.save_pretrained(out)
    assert inspect_folder(out).bits_per_weight == pytest.approx(alone.bits_per_weight, rel=0.1)
    assert inspect_folder(out, variant="small") == alone
    tokens = torch.arange(9)[None]
    for variant in ("small", None):
        loaded = AutoModelForCausalLM.from_pretrained(out, variant=variant)
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, compressed(tokens).logits)
    compressed.save_pretrained(out, variant="small")  # in one file: what there was in several goes away
    assert [name for name in listing(out) if name.startswith("model.small")] == ["model.small.safetensors"]


def test_the_present_folder_and_folders_of_templates(compressed, tokenizer, tmp_path, monkeypatch):
    """ "." has no name to put a hidden folder beside, and a folder does not replace one that holds files."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for _ in range(2):
        save.save(compressed, tokenizer, pathlib.Path(), overwrite=True)
    assert list((tmp_path / "here" / "additional_chat_templates").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]
    assert not [path for path in (tmp_path / "here").iterdir() if path.name.startswith(".")]
