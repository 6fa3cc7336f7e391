"""A run goes on, and a result is complete, for the same model by content, and for no other."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slablm import SlabError
from slablm.api import compress_folder
from slablm.checkpoint.shards import open_all
from slablm.compression.fingerprint import model_digest
from slablm.compression.options import RunOptions
from slablm.compression.run import _check_alike
from slablm.dense import loading, opening
from tests.compression.folders import Stop, assert_same_folders, in_memory, stop_after
from tests.conftest import byte_tokenizer


def other_weights(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][5, 5] += 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def other_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


@pytest.mark.parametrize(
    ("change", "named"),
    [(other_weights, r"model \(was \w{16}, is \w{16}\)"), (other_config, r"model config \(was \w{16}, is \w{16}\)")],
)
def test_a_complete_result_of_another_model(change, named, tiny_folder, quick, tmp_path):
    """Equal settings are not enough; nothing of the result that is there is lost."""
    source, out = tmp_path / "dense", tmp_path / "out"
    shutil.copytree(tiny_folder, source)
    compress_folder(str(tiny_folder), out, quick, RunOptions())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    change(source)
    with pytest.raises(SlabError, match=f"already holds a model, made from another {named}: .* give --overwrite"):
        compress_folder(str(source), out, quick, RunOptions(resume=True))
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_complete_result_from_another_text(tiny_folder, quick, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_bytes(Path(quick.calibration).read_bytes())
    config = replace(quick, calibration=str(text))
    compress_folder(str(tiny_folder), out, config, RunOptions())
    text.write_bytes(text.read_bytes()[1000:])
    with pytest.raises(SlabError, match=r"made from another calibration text \(was \w{16}, is \w{16}\)"):
        compress_folder(str(tiny_folder), out, config, RunOptions(resume=True))


def test_a_complete_result_of_unknown_origin(tiny_folder, quick, tmp_path):
    """Made in memory; or saved over one that a run had left."""
    for name in ("memory", "over"):
        out = tmp_path / name
        if name == "over":
            compress_folder(str(tiny_folder), out, replace(quick, iterations=5), RunOptions())
        in_memory(tiny_folder, out, quick)
        with pytest.raises(SlabError, match="already holds a model, and it is not known what it was made from: "):
            compress_folder(str(tiny_folder), out, quick, RunOptions(resume=True))


def test_a_model_that_was_copied_is_the_same_model(tiny_folder, quick, tmp_path):
    """Another folder, other dates, another division into files: a run goes on, and a result is complete."""
    straight, out, moved = tmp_path / "straight", tmp_path / "out", tmp_path / "moved" / tiny_folder.name
    compress_folder(str(tiny_folder), straight, quick, RunOptions())
    with pytest.raises(Stop):
        compress_folder(str(tiny_folder), out, quick, RunOptions(), stop_after(9))
    loading.load(str(tiny_folder))[0].save_pretrained(moved, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(moved)
    assert len(list(moved.glob("model-*.safetensors"))) > 1
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    result = compress_folder(str(moved), out, quick, RunOptions(resume=True))
    assert result.resumed_blocks == 1
    assert_same_folders(out, straight)
    heard = []
    compress_folder(str(moved), straight, quick, RunOptions(resume=True), say=heard.append)
    assert heard == [f"{straight} is complete, there is nothing to go on with"]


def test_ranks_with_different_models_are_refused():
    same = {"model": "a", "number of threads": "1"}
    _check_alike(same, same)
    with pytest.raises(SlabError, match=r"another model than on rank 0 \(there a, here b\)"):
        _check_alike(same, same | {"model": "b"})


def test_digest_of_large_tensors(tmp_path):
    """Pieces of them count, the same whether they are in a file or in memory."""
    from safetensors.torch import save_file

    state = {"w": torch.arange(1 << 17, dtype=torch.float32), "v": torch.ones(3)}
    save_file(state, tmp_path / "m.safetensors")
    names = ("model", "tokenizer", "files", "weights", "whole_because", "device")
    module = torch.nn.Module()
    for name, tensor in state.items():
        module.register_buffer(name, tensor)
    dense = opening.DenseModel(**dict.fromkeys(names) | {"weights": {}, "model": module})
    found = model_digest(dense)
    assert found == model_digest(replace(dense, weights=open_all([tmp_path / "m.safetensors"])))
    module.w += 1
    changed = model_digest(dense)
    module.w -= 1
    module.v[2] = 5
    assert len({found, changed, model_digest(dense)}) == 3
