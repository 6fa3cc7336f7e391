"""What can go wrong with files and disks: one clear line, a status, and nothing of the user's lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.test_cli import refused, slablm
from tests.compression.folders import assert_same_folders, build


@pytest.fixture
def options(text_file):
    return ["--method", "slab", "--calibration", text_file, "--num-samples", 4, "--seq-len", 32, "--iterations", 4]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A model in several files; do not write to it."""
    return build(tmp_path_factory.mktemp("sharded") / "dense", "llama", max_shard_size="60KB")


@pytest.fixture(scope="module")
def copy_of(sharded, tmp_path_factory):
    def copy():
        folder = tmp_path_factory.mktemp("copy") / "dense"
        shutil.copytree(sharded, folder)
        return folder

    return copy


def last_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[-1]


def missing_shard(folder):
    last_shard(folder).unlink()
    return r"index\.json names model-\d+-of-\d+\.safetensors, which is missing: download the model again"


def truncated_shard(folder):
    path = last_shard(folder)
    path.write_bytes(path.read_bytes()[:-7])
    return rf"{path.name} cannot be read \(its size .*\): it is truncated or damaged"


def unreadable_shard(folder):
    path = last_shard(folder)
    path.unlink()
    path.mkdir()
    return rf"{path.name} cannot be read \(Is a directory\)"


def garbage_in_a_header(folder):
    path = last_shard(folder)
    path.write_bytes(path.read_bytes()[:20] + b"\xff" + path.read_bytes()[21:])
    return rf"{path.name} cannot be read \(broken header"


def index_names_a_tensor_that_is_not_there(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = last_shard(folder).name
    path.write_text(json.dumps(index))
    return r"index\.json names tensor 'model\.layers\.9\.mlp\.up_proj\.weight', which model-.* lacks: download"


def index_is_no_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    return r"index\.json is damaged .*: download the model again"


def tensor_is_nowhere(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.1.input_layernorm.weight"
    path = folder / index["weight_map"].pop(name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({key: value for key, value in load_file(path).items() if key != name}, path)
    return rf"tensor '{name}' is missing"


def tensor_of_another_shape(folder):
    path = last_shard(folder)
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name] = torch.zeros(3, 5)
    save_file(tensors, path)
    return rf"tensor '{name}' has shape \[3, 5\], the config asks for \[.*\]"


FAULTS = [
    missing_shard,
    truncated_shard,
    unreadable_shard,
    garbage_in_a_header,
    index_names_a_tensor_that_is_not_there,
    index_is_no_index,
    tensor_is_nowhere,
    tensor_of_another_shape,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_models(fault, copy_of, options, tmp_path):
    source = copy_of()
    message = fault(source)
    before = {path.name: path.stat().st_size for path in source.iterdir()}
    refused(slablm("compress", source, tmp_path / "out", *options), message)
    assert list(tmp_path.iterdir()) == []
    assert before == {path.name: path.stat().st_size for path in source.iterdir()}


def test_a_missing_tensor_is_found_by_other_verbs_too(copy_of, text_file):
    source = copy_of()
    tensor_is_nowhere(source)
    refused(slablm("eval", source, "--text", text_file, "--seq-len", 32), "tensor 'model.layers.1.*' is missing")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--max-memory", "lots"], "--max-memory 'lots' is no size: write it like 4GB"),
        (["--max-shard-size", "0"], "--max-shard-size must be at least one byte"),
    ],
)
def test_sizes_that_are_none(option, message, tiny_folder, options, tmp_path):
    refused(slablm("compress", tiny_folder, tmp_path / "out", *options, *option), message)
    assert list(tmp_path.iterdir()) == []


def no_mapping(folder):
    (folder / "config.json").write_text("[]")
    (folder / "tokenizer_config.json").unlink()
    return r"config\.json is damaged \(it holds no JSON object\)"


def no_number(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "x"}))
    return "model '.*' cannot be loaded: .*'hidden_size' expected int"


@pytest.mark.parametrize("fault", [no_mapping, no_number])
@pytest.mark.parametrize("verb", ["compress", "plan"])
def test_configs_that_are_none(fault, verb, tiny_folder, options, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "dense")
    message = fault(tmp_path / "dense")
    refused(slablm(verb, tmp_path / "dense", tmp_path / "out", *options), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{file}"], "file is no model folder"),
        (["inspect", "{long}"], "File name too long"),
        (["compress", "{long}", "{out}"], "File name too long"),
        (["compress", "{model}", "{long}"], "File name too long"),
        (["compress", "{model}", "{out}", "--device", "meta"], "device 'meta' cannot be used: it holds no values"),
        (["compress", "{model}", "{out}", "--seed", 10**30], r"seed must lie between -2\*\*62 and 2\*\*62, got 10+$"),
        (["compress", "a b", "{out}"], "model 'a b' cannot be loaded: Repo id must use"),
        (["eval", "{model}", "--text", "builtin", "--seq-len", 0], "--seq-len must be 2 or more, got 0"),
        (["eval", "{model}", "--text", "builtin", "--seq-len", 1], "--seq-len must be 2 or more, got 1"),
        (["generate", "{model}", "caf\udce9"], "the prompt is no UTF-8 text"),
    ],
)
def test_arguments_that_cannot_be(arguments, message, tiny_folder, options, tmp_path):
    (tmp_path / "file").write_text("")
    known = {"file": tmp_path / "file", "long": tmp_path / ("x" * 300), "out": tmp_path / "out", "model": tiny_folder}
    typed = [str(argument).format(**known) for argument in arguments]
    refused(slablm(*typed, *(options if typed[0] == "compress" else [])), message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def in_a_process(code):
    """Python code in a process of its own; the caller may read its first line."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )


def test_two_processes_and_one_target(tiny_folder, options, tmp_path):
    holder = in_a_process(f"""
        from filelock import FileLock
        import pathlib
        folder = pathlib.Path({str(tmp_path)!r}, ".out.unfinished")
        folder.mkdir()
        with FileLock(folder / "lock"):
            (folder / "block-00000.safetensors").write_text("the other one's")
            print("locked", flush=True)
            input()
    """)
    try:
        assert holder.stdout.readline() == "locked\n"
        for more in ([], ["--resume"], ["--overwrite"]):
            done = slablm("compress", tiny_folder, tmp_path / "out", *options, *more)
            refused(done, "another process is compressing into .*out: wait for it, or choose another folder")
        assert (tmp_path / ".out.unfinished" / "block-00000.safetensors").read_text() == "the other one's"
        assert not (tmp_path / "out").exists()
        assert slablm("compress", tiny_folder, tmp_path / "other", *options).returncode == 0
    finally:
        holder.communicate("\n")


def test_a_full_disk_in_the_middle(sharded, options, tmp_path, monkeypatch):
    """The disk is full when the second block is written; when there is space again, the run goes on."""
    from slablm.compression import journal

    original = journal.write_tensors

    def full(path, tensors, metadata):
        if path.stem == "block-00001":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(path, tensors, metadata)

    out = tmp_path / "out"
    monkeypatch.setattr(journal, "write_tensors", full)
    done = slablm("compress", sharded, out, *options)
    refused(
        done, "writing .*out failed, nothing was changed there: the disk is full; 1 finished blocks are kept, run .*"
    )
    assert not out.exists()
    monkeypatch.undo()
    result = json.loads(slablm("compress", sharded, out, *options, "--resume", "--json").stdout)
    assert result["resumed_blocks"] == 1
    assert slablm("compress", sharded, tmp_path / "straight", *options).returncode == 0
    assert_same_folders(out, tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]


def test_a_limit_on_file_sizes(tiny_folder, options, tmp_path):
    """The real thing: the kernel refuses the bytes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        done = slablm("compress", tiny_folder, tmp_path / "out", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    refused(done, "writing .*out failed, nothing was changed there: File too large")
    assert list(tmp_path.iterdir()) == []


def can_mount():
    unshare = shutil.which("unshare")
    command = [unshare or "false", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return unshare is not None and subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="tmpfs cannot be mounted here")
def test_a_really_full_disk(sharded, options, tmp_path):
    """A file system that gets too small while the run is on: without the check at the start, which is told a fable."""
    disk = tmp_path / "disk"
    disk.mkdir()
    code = (
        "from slablm.planning import checks; checks.free_bytes = lambda out: 10**12; import slablm.cli as c; c.main()"
    )
    compress = [sys.executable, "-c", code, "compress", str(sharded), str(disk / "out"), *map(str, options)]
    script = f"""
        mount -t tmpfs -o size=150k none {disk}
        echo mine > {disk}/notes.txt
        "$@" 2> {tmp_path}/block.txt
        ls -A {disk} > {tmp_path}/listing
        mount -o remount,size=200k {disk}
        "$@" --resume 2> {tmp_path}/end.txt
        mount -o remount,size=20m {disk}
        "$@" --resume 2> {tmp_path}/resumed.txt && cp -r {disk}/out {tmp_path}/result
        ls -A {disk} > {tmp_path}/listing-after
    """
    subprocess.run(
        ["unshare", "-rm", "sh", "-c", textwrap.dedent(script), "sh", *compress],
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    for name, done in (("block", 1), ("end", 2)):
        last = (tmp_path / f"{name}.txt").read_text().splitlines()[-1]
        assert last.startswith("slablm: error: writing ")
        assert f"the disk is full; {done} finished blocks are kept" in last
    assert (tmp_path / "listing").read_text().split() == [".out.unfinished", "notes.txt"]
    assert "Going on after 2 finished blocks" in (tmp_path / "resumed.txt").read_text()
    assert (tmp_path / "listing-after").read_text().split() == ["notes.txt", "out"]
    assert slablm("compress", sharded, tmp_path / "straight", *options).returncode == 0
    assert_same_folders(tmp_path / "result", tmp_path / "straight")
