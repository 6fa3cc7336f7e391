"""A damaged file is refused by `inspect` and by loading, whichever byte it is."""

import shutil
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slablm import SlabError
from slablm.checkpoint import integrity
from slablm.checkpoint.inspection import inspect_folder
from slablm.checkpoint.shards import TensorFile


@pytest.fixture
def copy(compressed_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(compressed_folder, folder)
    return folder


def refused(folder, match):
    with pytest.raises(SlabError, match=match):
        inspect_folder(folder)
    with pytest.raises(SlabError, match=match):
        AutoModelForCausalLM.from_pretrained(folder)


def flip_bit(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("position", [0.0, 0.3, 0.7, 0.9999])
def test_a_flipped_bit_in_any_tensor_is_found(copy, position):
    path = copy / "model.safetensors"
    start, size = TensorFile.open(path).header_bytes, path.stat().st_size
    flip_bit(path, start + int((size - 1 - start) * position))
    refused(copy, "is corrupted")


def test_a_flipped_bit_in_the_header_is_found(copy):
    path = copy / "model.safetensors"
    names = path.read_bytes().index(b"layers.1.mlp.up_proj.values", path.read_bytes().index(b'"dtype"'))
    flip_bit(path, names)
    refused(copy, "has no digest|cannot be read")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.values", "model.norm.weight"])
def test_a_missing_tensor_is_found(copy, name):
    path = copy / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys() if key != name}  # noqa: SIM118
    save_file(tensors, path, metadata=metadata)
    refused(copy, f"tensor '{name}' is missing")


def test_a_truncated_file_is_found(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(copy, "truncated or damaged")


def test_a_file_of_another_origin_is_refused(copy):
    save_file(load_file(copy / "model.safetensors"), copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, "carries no slablm digests")


def test_digest_covers_type_and_shape():
    tensor = torch.arange(6, dtype=torch.int16)
    assert integrity.digest(tensor) == integrity.digest(tensor.clone())
    assert integrity.digest(tensor) != integrity.digest(tensor.view(torch.uint16))
    assert integrity.digest(tensor) != integrity.digest(tensor.view(2, 3))
    assert integrity.digest(torch.empty(0, 3)) != integrity.digest(torch.empty(0, 4))


def test_tensors_are_hashed_side_by_side(compressed_folder, monkeypatch):
    """Two threads meet inside the hashing of two tensors; one thread would wait for nobody."""
    meeting, original, met = threading.Barrier(2, timeout=60), integrity.digest, []

    def digest(piece):
        if not met:
            meeting.wait()
            met.append(True)
        return original(piece)

    monkeypatch.setattr(integrity, "digest", digest)
    monkeypatch.setattr(integrity.os, "cpu_count", lambda: 2)
    inspect_folder(compressed_folder)
    assert met


def test_a_difference_on_any_thread_is_reported(copy):
    path = copy / "model.safetensors"
    file = TensorFile.open(path)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        flip_bit(path, file.pieces[name].source[1])
    refused(copy, r"tensor 'model\.(embed_tokens|norm)\.weight' is corrupted")
