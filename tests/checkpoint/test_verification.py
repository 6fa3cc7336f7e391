"""Which files are believed: an index and headers that agree, all in the model's own folder."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import slablm
from slablm import SlabError
from slablm.checkpoint.files import INDEX, read_index
from slablm.checkpoint.hf import SlabHfQuantizer
from slablm.checkpoint.inspection import inspect_folder
from slablm.checkpoint.verification import open_folder
from slablm.dense.loading import load
from slablm.dense.opening import open_dense
from slablm.dense.sources import model_files
from tests.checkpoint.folders import edit_json, edit_record


@pytest.fixture
def sharded(tiny_model, tokenizer, quick, tmp_path):
    """A compressed model in several files."""
    model = slablm.compress(tiny_model, quick, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "sharded")
    return tmp_path / "sharded"


def refused(folder, match, error=SlabError):
    for read in (inspect_folder, lambda path: load(str(path))):
        with pytest.raises(SlabError, match=match):
            read(folder)
    with pytest.raises(error, match=match if error is SlabError else ""):
        AutoModelForCausalLM.from_pretrained(folder)


NAMES = ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x", "C:x", "", ".", "..", "a\0b", 3, None]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_no_file_of_the_folder(name, tmp_path):
    index = tmp_path / INDEX
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a.weight": name}}))
    with pytest.raises(SlabError, match=r"index\.json names .* for tensor 'a\.weight', which is no file of its own"):
        read_index(index)
    with pytest.raises(SlabError, match="is no file of its own folder"):
        model_files(str(tmp_path), None)


def test_a_dense_model_whose_index_leads_elsewhere(tiny_folder, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(tiny_folder, folder)
    shutil.move(folder / "model.safetensors", tmp_path / "model.safetensors")
    names = load_file(tmp_path / "model.safetensors")
    (folder / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "../model.safetensors")})
    )
    for read in (load, open_dense):
        with pytest.raises(SlabError, match=r"names '\.\./model\.safetensors' .* no file of its own folder: download"):
            read(str(folder))


@pytest.mark.parametrize("text", ["", "[]", "3", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 9999, '"\udcff"'])
def test_an_index_that_is_none(text, tmp_path):
    (tmp_path / INDEX).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SlabError, match="is damaged"):
        read_index(tmp_path / INDEX)


@pytest.mark.parametrize("where", ["../outside", "inside", "/absolute"])
def test_weights_outside_the_folder(where, sharded, tmp_path):
    """The very same bytes, in another place: whoever made the index does not choose what is read."""
    shard = sorted(sharded.glob("*.safetensors"))[0]
    place = {"../outside": "..", "inside": "inside", "/absolute": str(tmp_path / "elsewhere")}[where]
    (sharded / place).mkdir(exist_ok=True)
    shutil.move(shard, sharded / place / shard.name)

    def move(index):
        for tensor, file in index["weight_map"].items():
            if file == shard.name:
                index["weight_map"][tensor] = f"{place}/{file}"

    edit_json(sharded / INDEX, move)
    for read in (inspect_folder, lambda path: load(str(path))):
        with pytest.raises(SlabError, match="is no file of its own folder"):
            read(sharded)
    with pytest.raises(SlabError, match="lies outside the model's folder"):
        AutoModelForCausalLM.from_pretrained(sharded)


def test_all_weights_in_a_folder_below(sharded):
    (sharded / "inside").mkdir()
    for shard in sharded.glob("*.safetensors"):
        shutil.move(shard, sharded / "inside" / shard.name)
    edit_json(
        sharded / INDEX,
        lambda index: index.update(weight_map={name: f"inside/{file}" for name, file in index["weight_map"].items()}),
    )
    with pytest.raises(SlabError, match="no index names"):
        AutoModelForCausalLM.from_pretrained(sharded)


@pytest.fixture
def cached(sharded, tmp_path, monkeypatch):
    """The model as the hub's cache has it: links from a snapshot to blobs elsewhere."""
    model, commit = tmp_path / "hub" / "models--owner--packed", "0123456789" * 4
    snapshot, blobs = model / "snapshots" / commit, model / "blobs"
    for folder in (snapshot, blobs, model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(sharded.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_a_model_in_the_hub_cache(cached, sharded):
    assert inspect_folder(cached) == inspect_folder(sharded)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        expected = load(str(sharded))[0](tokens).logits
        for source in ("owner/packed", str(cached)):
            assert torch.equal(load(source)[0](tokens).logits, expected)


def test_a_damaged_model_in_the_hub_cache(cached):
    """Its config is read by transformers first; what it says is checked all the same."""
    edit_json(cached / "config.json", lambda config: config.update(rms_norm_eps=0.5))
    with pytest.raises(SlabError, match="was changed after the model was written"):
        load("owner/packed")


def test_an_index_that_says_something_else(sharded):
    first, second = (path.name for path in sorted(sharded.glob("*.safetensors"))[:2])

    def swap(index):
        name = next(tensor for tensor, file in index["weight_map"].items() if file == first)
        index["weight_map"][name] = second

    edit_json(sharded / INDEX, swap)
    refused(sharded, rf"names tensor '.*', which {second} lacks")


def test_an_index_that_does_not_name_a_tensor(sharded):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    refused(sharded, r"does not name tensor 'model\.norm\.weight'")


def test_a_shard_that_the_index_does_not_name(sharded):
    """Left over from another model: transformers does not read it, and neither does `inspect`."""
    (sharded / "model-00009-of-00009.safetensors").write_text("garbage")
    inspect_folder(sharded)
    load(str(sharded))


def test_shards_of_two_models(sharded, tmp_path):
    """Every tensor has the right digest, in its own file."""
    shard = sorted(sharded.glob("*.safetensors"))[0]
    edit_record(shard, lambda record: record["digests"].update({"model.norm.weight": "0" * 16}))
    refused(sharded, "belongs to another model than")


def test_a_tensor_that_is_there_twice(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    with safe_open(second, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(second) | {name: tensor}, second, metadata=metadata)
    refused(sharded, "is also in|lacks|does not name")


def test_a_state_dict_has_no_digests_that_could_be_checked(compressed_folder):
    """What transformers does not hand over cannot be checked, and is not taken on trust."""
    config = AutoConfig.from_pretrained(compressed_folder)
    state = load_file(compressed_folder / "model.safetensors")
    with pytest.raises(SlabError, match="names no files .* whose digests could be checked"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)


@pytest.mark.parametrize("files", [None, []])
def test_no_files_are_refused_by_the_quantizer(files, compressed_folder):
    from slablm.checkpoint.hf import SlabQuantizationConfig
    from slablm.checkpoint.inspection import read_quantization_config

    config = AutoConfig.from_pretrained(compressed_folder)
    quantizer = SlabHfQuantizer(SlabQuantizationConfig(**read_quantization_config(compressed_folder)))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{"num_hidden_layers": 1}))
    model.config.name_or_path = config.name_or_path
    with pytest.raises(SlabError, match="names no files"):
        quantizer._process_model_before_weight_loading(model, checkpoint_files=files)


def test_pickled_weights_are_refused(compressed_folder, tmp_path):
    shutil.copytree(compressed_folder, tmp_path / "copy")
    state = load_file(tmp_path / "copy" / "model.safetensors")
    (tmp_path / "copy" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "copy" / "pytorch_model.bin")
    refused(tmp_path / "copy", "holds no safetensors files|cannot be read", error=SlabError)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"quantization_config": 3}', '{"quantization_config": {}}', ""])
def test_a_config_that_is_none(text, compressed_folder, tmp_path):
    shutil.copytree(compressed_folder, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text(text)
    with pytest.raises(SlabError, match="is damaged|is not a slablm checkpoint"):
        open_folder(tmp_path / "copy")
    with pytest.raises(SlabError):
        load(str(tmp_path / "copy"))


LIMITED = """
import pathlib, re, resource, sys
from slablm.checkpoint.verification import _open
data = 1024 * int(re.search(r"VmData:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_DATA, (data + (16 << 20),) * 2)
_open(pathlib.Path(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for what the process has")
def test_looking_at_a_file_takes_no_memory_of_its_size(tmp_path):
    """The compressed file of a model that does not fit into memory is looked at, too."""
    save_file({"weight": torch.zeros(64 << 20, dtype=torch.uint8)}, tmp_path / "large.safetensors")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "large.safetensors")], check=False)
    assert done.returncode == 0
