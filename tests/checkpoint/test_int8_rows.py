"""Embedding and head in int8 rows, in files: saved again to the same bytes, and checked before they are believed."""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from slablm import SlabError
from slablm.api import compress_folder
from slablm.checkpoint import integrity
from slablm.checkpoint.inspection import inspect_folder
from slablm.checkpoint.int8_rows import check_int8_rows
from slablm.checkpoint.shards import Piece
from slablm.compression.options import RunOptions
from slablm.dense.loading import load
from slablm.runtime import kernels
from slablm.runtime.int8 import Int8Embedding, Int8Linear, int8_names
from tests.checkpoint.folders import age, edit_json, edit_record
from tests.compression.folders import build

TOKENS = torch.arange(20)[None]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def folder(request, tmp_path_factory, text_file):
    """A model with symbols and int8 rows, its head tied to the embedding or not; do not write to it."""
    from slablm import CompressionConfig

    place = tmp_path_factory.mktemp("int8")
    source = build(place / "dense", request.param)
    config = CompressionConfig(bits_per_weight=5.0, head_bits=8, calibration=str(text_file), num_samples=4, seq_len=32)
    compress_folder(str(source), place / "out", config, RunOptions())
    return place / "out"


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def is_tied(folder):
    return json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", False)


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens).logits


def refused(folder, match):
    for read in (inspect_folder, lambda path: load(str(path)), AutoModelForCausalLM.from_pretrained):
        with pytest.raises(SlabError, match=match) as info:
            read(folder)
        assert "\n" not in str(info.value)


def test_what_is_written(folder):
    config, stored = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    entries = config["quantization_config"]
    assert entries["format_version"] >= 8
    assert entries["int8_rows"] == [HEAD, EMBEDDING]
    assert config["dtype"] == "float32"
    names = [EMBEDDING] if is_tied(folder) else [EMBEDDING, HEAD]
    assert {name for name in stored if name.startswith((EMBEDDING, HEAD))} == {
        f"{name}.{part}" for name in names for part in ("weight", "scales")
    }
    for name in names:
        weight, scales = stored[f"{name}.weight"], stored[f"{name}.scales"]
        assert (weight.dtype, weight.shape, scales.dtype, scales.shape) == (
            torch.int8,
            (258, 64),
            torch.float16,
            (258,),
        )
    assert inspect_folder(folder).head_bits == inspect_folder(folder).to_dict()["head_bits"] == 8
    assert "| head and embedding | 8 bits |" in (folder / "README.md").read_text()


def test_a_loaded_model_is_saved_to_the_same_bytes(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.to(torch.bfloat16).to(torch.float32)
    model.tie_weights()
    for name in ("again", "once more"):
        model.save_pretrained(tmp_path / name)
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (folder / file).read_bytes()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)


def test_several_files(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert torch.equal(logits(again), logits(model))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    dense = load(str(folder.parent / "dense"))[0]
    assert index["metadata"]["total_parameters"] == dense.num_parameters()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loaded_in_another_type(dtype, folder):
    plain, model = (AutoModelForCausalLM.from_pretrained(folder, dtype=kind) for kind in (torch.float32, dtype))
    for name in (EMBEDDING, HEAD):
        rows, expected = model.get_submodule(name), plain.get_submodule(name)
        assert torch.equal(rows.weight, expected.weight)
        assert torch.equal(rows.scales, expected.scales)
    assert model.dtype == logits(model).dtype == dtype
    error = (logits(model).float() - logits(plain)).norm() / logits(plain).norm()
    assert error < 0.05


@pytest.mark.parametrize("forced", ["portable", "reference"])
def test_without_fast_kernels(forced, folder, monkeypatch):
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    monkeypatch.setenv("SLABLM_KERNEL", forced)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except SlabError:
        pytest.skip("no compiled kernels")
    for tokens in (TOKENS, TOKENS[:, :1]):
        torch.testing.assert_close(logits(model, tokens), expected[:, : tokens.shape[1]], rtol=1e-3, atol=1e-4)


def test_generation(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generate(TOKENS, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0).shape == (1, 25)


def test_models_with_other_heads(folder, tmp_path):
    whole, bare = AutoModelForCausalLM.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert int8_names(bare) == ["embed_tokens"]
    with torch.no_grad():
        expected = whole.model(TOKENS).last_hidden_state
        assert torch.equal(bare(TOKENS).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=1)
    assert int8_names(classifier) == [EMBEDDING]
    assert logits(classifier).shape == (1, 3)
    bare.save_pretrained(tmp_path / "bare")
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["quantization_config"]["int8_rows"] == [
        "embed_tokens"
    ]
    headed = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    assert isinstance(headed.get_input_embeddings(), Int8Embedding)
    if is_tied(folder):  # it has a head now
        assert isinstance(headed.get_output_embeddings(), Int8Linear)
        assert torch.equal(logits(headed), logits(whole))
        headed.save_pretrained(tmp_path / "headed")
        assert (tmp_path / "headed" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_another_kind_of_tying_is_refused(folder):
    if not is_tied(folder):
        pytest.skip("it has a head of its own")
    with pytest.raises(SlabError, match="lm_head has no scales of its own: load the model with tie_word_embeddings"):
        AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)


PLACES = {
    "a block on disk": {"model.layers.0": "cpu", "model.layers.1": "disk"},
    "embedding and head on disk": {"model.layers": "cpu", EMBEDDING: "disk", HEAD: "disk"},
}


@pytest.mark.parametrize("case", PLACES)
def test_device_maps_with_offloading(case, folder, tmp_path):
    from accelerate import __version__
    from packaging.version import Version

    places = {EMBEDDING: "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", HEAD: "cpu"} | PLACES[case]
    if is_tied(folder) and places[HEAD] == "disk" and Version(__version__) < Version("1.15"):
        pytest.skip("accelerate loses tied tensors that lie on the disk before version 1.15")
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "moved")
    for _ in range(2):
        # Layers that move run on the reference, the others on kernels, which round inputs to 14 bits.
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=5e-4)


def entry(value):
    return lambda config: config["quantization_config"].update(int8_rows=value)


ENTRIES = {
    "text": (entry("lm_head"), "int8_rows is damaged: it is no list of names"),
    "an empty list": (entry([]), "int8_rows is damaged: it is no list of names"),
    "an object": (entry({HEAD: 8}), "int8_rows is damaged: it is no list of names"),
    "a number": (entry([HEAD, 8]), "int8_rows is damaged: 8 is no name"),
    "no name": (entry([""]), "int8_rows is damaged: '' is no name"),
    "twice": (entry([HEAD, HEAD, EMBEDDING]), "int8_rows is damaged: 'lm_head' is no name"),
    "a compressed layer": (
        entry([HEAD, "model.layers.0.mlp.up_proj"]),
        "'model.layers.0.mlp.up_proj' is no name",
    ),
    "a part of it": (entry([EMBEDDING]), "int8_rows of config.json is not what the files were written with"),
    "one more": (entry([HEAD, EMBEDDING, "model.norm"]), "int8_rows of config.json is not what the files were written"),
    "none": (lambda config: config["quantization_config"].pop("int8_rows"), "int8_rows of config.json is not what"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_entries(case, damaged):
    edit, match = ENTRIES[case]
    edit_json(damaged / "config.json", edit)
    refused(damaged, match)


@pytest.mark.parametrize("version", [1, 3, 5, 6, 7])
def test_int8_rows_are_no_part_of_earlier_versions(version, damaged):
    age(damaged, version)
    refused(damaged, f"it has int8_rows, which format {version} has not|has symbols|never released")


def reseal(folder, edit):
    """Change tensors, and give them digests as a writer of such files would."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(tensors)
    record = json.loads(metadata[integrity.METADATA_KEY])
    fresh = {name: integrity.digest(tensor) for name, tensor in tensors.items()}
    tied = {alias: fresh[name] for group in record["tied"] for name in group if name in fresh for alias in group}
    record["digests"] = {**fresh, **tied}
    save_file(tensors, path, metadata | {integrity.METADATA_KEY: json.dumps(record)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_none(value, damaged):
    reseal(damaged, lambda tensors: tensors[f"{EMBEDDING}.scales"].__setitem__(3, value))
    refused(damaged, r"'model.embed_tokens.scales' has a scale that is negative, NaN or Inf: download or compress")


def test_the_resealed_folder_itself_is_accepted(damaged):
    reseal(damaged, lambda tensors: tensors[f"{EMBEDDING}.scales"].__setitem__(3, 0.0))
    inspect_folder(damaged)
    model = AutoModelForCausalLM.from_pretrained(damaged)
    assert (model.get_input_embeddings()(torch.tensor([3])) == 0).all()


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name])})


PARTS = {
    "16-bit rows": (put(f"{EMBEDDING}.weight", torch.Tensor.half), r"weight' is F16 .*, config.json says int8 rows"),
    "scales in float32": (put(f"{EMBEDDING}.scales", torch.Tensor.float), r"scales' F32 \[258\], config.json says"),
    "too few scales": (put(f"{EMBEDDING}.scales", lambda t: t[:-1].clone()), r"F16 \[257\], config.json says int8"),
    "one scale": (put(f"{EMBEDDING}.scales", lambda t: t[0].clone()), r"F16 \[\], config.json says int8"),
    "a vector": (put(f"{EMBEDDING}.weight", lambda t: t.reshape(-1)), "are no int8 rows"),
    "other rows": (put(f"{EMBEDDING}.weight", lambda t: t.T.contiguous()), r"I8 \[64, 258\] and .*, config.json says"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_every_part_is_compared_with_the_header(case, damaged):
    edit, match = PARTS[case]
    reseal(damaged, edit)
    refused(damaged, match)


def test_missing_scales(damaged):
    def forget(record):
        record["tied"] = [group for group in record["tied"] if f"{EMBEDDING}.scales" not in group]

    reseal(damaged, lambda tensors: tensors.pop(f"{EMBEDDING}.scales"))
    edit_record(damaged / "model.safetensors", forget)
    refused(damaged, r"tensor '(lm_head|model.embed_tokens).scales' is missing")


def test_rows_of_another_shape_than_the_models(damaged):
    def shorter(tensors):
        for name in [name for name in tensors if name.startswith((EMBEDDING, HEAD))]:
            tensors[name] = tensors[name][:200].clone()

    reseal(damaged, shorter)
    with pytest.raises(SlabError, match=r"is 200 × 64 in the files and 258 × 64 in LlamaForCausalLM"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_headers_alone(tmp_path):
    """What digests do not let through from outside."""
    rows = {"a.weight": torch.empty(3, 2, dtype=torch.int8), "a.scales": torch.empty(3).half()}
    pieces = {name: Piece.of(tensor) for name, tensor in rows.items()}
    tied = [["a.weight", "b.weight"], ["a.scales", "b.scales"]]
    assert check_int8_rows(("a", "b"), pieces, tied, tmp_path) == {"a": "a", "b": "a"}
    with pytest.raises(SlabError, match=r"does not list the int8 rows 'a\.weight'"):
        check_int8_rows((), pieces, tied, tmp_path)
    other = pieces | {"b.scales": pieces["a.scales"]}
    with pytest.raises(SlabError, match=r"'a\.weight' and 'b\.scales' are no int8 rows"):
        check_int8_rows(("a", "b"), other, tied, tmp_path)
    with pytest.raises(SlabError, match=r"tensor 'c\.weight' is missing"):
        check_int8_rows(("a", "c"), pieces, tied, tmp_path)


def test_a_flipped_bit(damaged):
    path = damaged / "model.safetensors"
    content = bytearray(path.read_bytes())
    rows = load_file(path)[f"{EMBEDDING}.weight"].numpy().tobytes()
    content[content.index(rows) + 1000] ^= 1
    path.write_bytes(bytes(content))
    refused(damaged, "tensor 'model.embed_tokens.weight' is corrupted")


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"dtype": "float16"}])
def test_models_in_16_bits(settings, quick, tmp_path):
    source = build(tmp_path / "dense", "gemma3_text")
    compress_folder(str(source), tmp_path / "out", replace(quick, head_bits=8), RunOptions(**settings))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(model.dtype) == f"torch.{settings['dtype']}"
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_nothing_of_the_file_stays_in_memory_beside_its_numbers(folder):
    """One view of the mapped file would keep all of it, and the model would be there twice."""
    maps = Path("/proc/self/maps")
    if not maps.is_file() or kernels.backend().library is None:
        pytest.skip("needs /proc, and kernels: else tensors stay in the mapping")
    model = AutoModelForCausalLM.from_pretrained(folder)
    gc.collect()  # transformers 5.18 leaves a circle behind
    assert str(folder) not in maps.read_text()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied(folder)
