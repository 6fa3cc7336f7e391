"""What `config.json` says is not believed before types, ranges, headers and digests agree with it."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from slablm import CompressionConfig, SlabError, SlabLinear
from slablm.checkpoint.description import Description
from slablm.checkpoint.guard import check_version
from slablm.checkpoint.inspection import inspect_folder
from slablm.dense.loading import load
from tests.checkpoint.folders import age, edit_header, edit_json, edit_record

LAYER = "model.layers.1.mlp.up_proj"


OLD = Path(__file__).parent / "old"  # folders that earlier versions have written


@pytest.fixture(scope="module")
def symbol_folder(tmp_path_factory, tiny_folder, text_file):
    """The tiny model with symbols; do not write to it."""
    from slablm.cli.compress import run
    from slablm.compression.options import RunOptions

    out = tmp_path_factory.mktemp("symbols") / "out"
    config = CompressionConfig(bits_per_weight=5.0, calibration=str(text_file), num_samples=4, seq_len=32)
    run(str(tiny_folder), out, config, RunOptions())
    return out


@pytest.fixture(params=[3, 4, 8])
def copy_of(request, tmp_path):
    """A copy of a folder in the present format, in format 4, or in format 3, which has no digest of config.json."""

    def copy(folder):
        shutil.copytree(folder, tmp_path / "copy")
        return tmp_path / "copy" if request.param == 8 else age(tmp_path / "copy", request.param)

    return copy


def refused(folder, match):
    for read in (inspect_folder, lambda path: load(str(path)), AutoModelForCausalLM.from_pretrained):
        with pytest.raises(SlabError, match=match) as info:
            read(folder)
        assert "\n" not in str(info.value)


def of_layer(**changes):
    return lambda config: config["quantization_config"]["modules"][LAYER].update(changes)


ENTRIES = {
    "kept huge": (of_layer(kept=10**12), "keeps 1000000000000 of the 64 entries|not what the files"),
    "kept negative": (of_layer(kept=-1), "'kept' of .* is -1"),
    "kept a fraction": (of_layer(kept=1.5), "'kept' of .* is 1.5"),
    "kept of another layer": (of_layer(kept=7), r"up_proj\.\w+' is .*, config.json says .*|not what the files"),
    "rank huge": (of_layer(rank=10**9), r"config\.json says .*1000000000|not what the files"),
    "rank true": (of_layer(rank=True), "'rank' of .* is True"),
    "signs a number": (of_layer(signs=1), "'signs' of .* is 1"),
    "a group without bits": (of_layer(group_size=32), "'group_size' of .* is 32"),
    "8 bits": (of_layer(value_bits=8), "'value_bits' of .* is 8"),
    "bits without a group": (of_layer(value_bits=3), "'group_size' of .* is None"),
    "a type that is none": (of_layer(value_dtype="float8"), "'value_dtype' of .* is 'float8'"),
    "error of text": (of_layer(output_error="small"), "'output_error' of .* is 'small'"),
    "error infinite": (of_layer(unseen_error=float("inf")), "'unseen_error' of .* is inf"),
    "error none": (of_layer(output_error=None), "'output_error' of .* is None"),
    "unknown entry": (of_layer(surprise=1), "has an unknown entry 'surprise'"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_entries_of_a_layer(case, copy_of, compressed_folder):
    edit, match = ENTRIES[case]
    folder = copy_of(compressed_folder)
    edit_json(folder / "config.json", edit)
    refused(folder, match)


def turned_otherwise(config):
    modules = config["quantization_config"]["modules"]
    next(entry for entry in modules.values() if "rotation" in entry)["seed"] = 12345


SYMBOL_ENTRIES = {
    "7 bits": (of_layer(symbol_bits=7), "'symbol_bits' of .* is 7"),
    "bits of text": (of_layer(symbol_bits="3"), "'symbol_bits' of .* is '3'"),
    "no columns": (of_layer(in_features=0), "'in_features' of .* is 0"),
    "columns of another number of tiles": (of_layer(in_features=65), r"symbols' is .*, config.json says .*|not what"),
    "columns that fill the same tiles": (of_layer(in_features=63, rotation=None, seed=None), "not what the files"),
    "a rotation without a seed": (of_layer(rotation=4, seed=None), "'seed' of .* is None"),
    "a rotation that does not fit": (of_layer(rotation=48, seed=1), "wrong about .*a block of 48|not what the files"),
    "a seed of 65 bits": (of_layer(rotation=4, seed=2**64), "wrong about .*does not fit|not what the files"),
    "a fraction": (of_layer(rotation=0.5, seed=1), "'rotation' of .* is 0.5"),
    "a seed without a rotation": (of_layer(rotation=None, seed=1), "'seed' of .* is 1"),
    "another rotation": (of_layer(rotation=8, seed=1), "not what the files"),
    "another seed": (turned_otherwise, "not what the files"),
    "kept": (of_layer(kept=3), "has an unknown entry 'kept'"),
    "groups": (of_layer(group_size=64), "has an unknown entry 'group_size'"),
}


@pytest.mark.parametrize("case", SYMBOL_ENTRIES)
def test_entries_of_a_layer_with_symbols(case, symbol_folder, tmp_path):
    edit, match = SYMBOL_ENTRIES[case]
    shutil.copytree(symbol_folder, tmp_path / "copy")
    edit_json(tmp_path / "copy" / "config.json", edit)
    refused(tmp_path / "copy", match)


@pytest.mark.parametrize("version", [1, 3, 5])
def test_symbols_are_no_part_of_earlier_versions(version, symbol_folder, tmp_path):
    shutil.copytree(symbol_folder, tmp_path / "copy")
    refused(age(tmp_path / "copy", version), f"has symbols, which format {version} has not")


def test_symbols_of_6_bits_are_no_part_of_version_9(symbol_folder):
    entries = json.loads((symbol_folder / "config.json").read_text())["quantization_config"]
    entries["modules"][LAYER].update(symbol_bits=6)
    assert Description.of_config(entries | {"format_version": 10}).written_version == 10
    with pytest.raises(SlabError, match="it has symbols of 6 bits, which format 9 has not"):
        Description.of_config(entries | {"format_version": 9})


def test_symbols_of_the_form_that_was_never_released(symbol_folder, tmp_path):
    shutil.copytree(symbol_folder, tmp_path / "copy")
    refused(age(tmp_path / "copy", 6), "never released and is not read: compress the model again")


MODULES = {
    "no object": (lambda q: q.update(modules=[1]), "modules or value_dtype missing or wrong"),
    "a layer is no object": (lambda q: q["modules"].update({LAYER: 3}), "up_proj' is no object"),
    "a layer has no name": (lambda q: q["modules"].update({"": q["modules"][LAYER]}), "'' is no name of a layer"),
    "a layer without tensors": (
        lambda q: q["modules"].update({"model.layers.0.mlp": q["modules"][LAYER]}),
        r"tensor 'model.layers.0.mlp.left' is missing|not what the files were written with",
    ),
    "a layer is not listed": (
        lambda q: q["modules"].pop(LAYER),
        "does not list the compressed layer 'model.layers.1.mlp.up_proj'|not what the files were written with",
    ),
    "another value type": (lambda q: q.update(value_dtype="bfloat16"), "is F16 .* says bfloat16|not what the files"),
    "a value type that is none": (lambda q: q.update(value_dtype=["float16"]), "modules or value_dtype missing"),
    "version true": (lambda q: q.update(format_version=True), "format version True is not supported"),
    "version text": (lambda q: q.update(format_version="4"), "format version '4' is not supported"),
    "version 3.0": (lambda q: q.update(format_version=3.0), "format version 3.0 is not supported"),
    "settings are a list": (lambda q: q.update(compression=[]), "compression settings are damaged|was changed"),
    "ratio text": (
        lambda q: q["compression"].update(ratio="x"),
        "'ratio' must be a number or null, got 'x'|was changed",
    ),
    "drift no list": (lambda q: q.update(drift=0.5), "drift is damaged: it is no list|was changed"),
    "drift a number": (lambda q: q.update(drift=[0.5]), "drift is damaged: block 0 has 0.5|was changed"),
    "drift text": (lambda q: q["drift"][1].update(rest="x"), "drift is damaged: block 1 has .*'x'|was changed"),
    "drift true": (lambda q: q["drift"][1].update(first=True), "drift is damaged: block 1 has|was changed"),
    "drift negative": (lambda q: q["drift"][0].update(rest=-0.1), "drift is damaged: block 0 has|was changed"),
    "drift infinite": (lambda q: q["drift"][0].update(rest=float("inf")), "drift is damaged: block 0 has|was changed"),
    "drift incomplete": (lambda q: q["drift"][0].pop("first"), "drift is damaged: block 0 has|was changed"),
    "drift and more": (lambda q: q["drift"][0].update(last=0.1), "drift is damaged: block 0 has|was changed"),
    "targets 3": (lambda q: q["compression"].update(targets=3), "'targets' must be a list of texts, got 3|was changed"),
}


@pytest.mark.parametrize("case", MODULES)
def test_entries_of_the_checkpoint(case, copy_of, compressed_folder):
    edit, match = MODULES[case]
    folder = copy_of(compressed_folder)
    edit_json(folder / "config.json", lambda config: edit(config["quantization_config"]))
    refused(folder, match)


@pytest.mark.parametrize("version", [True, "4", 3.0, None, [5], 0, 11])
def test_versions_that_are_none(version):
    with pytest.raises(SlabError, match="is not supported"):
        check_version(version)


@pytest.mark.parametrize(
    "settings",
    [{"ratio": "x"}, {"targets": 3}, {"targets": "all"}, {"seed": 1.5}, {"bos": 1}, {"rank": None}, [], "slab"],
)
def test_damaged_settings_are_one_line(settings):
    with pytest.raises(SlabError, match="must be|are damaged"):
        CompressionConfig.from_dict(settings)


@pytest.mark.parametrize("entry", [{"num_attention_heads": 8}, {"rope_theta": 1.0}, {"rms_norm_eps": 0.5}, {"new": 1}])
def test_the_rest_of_the_config_is_covered(entry, compressed_folder, tmp_path):
    shutil.copytree(compressed_folder, tmp_path / "copy")
    edit_json(tmp_path / "copy" / "config.json", lambda config: config.update(entry))
    refused(tmp_path / "copy", "config.json was changed after the model was written")


def test_layout_and_volatile_entries_of_the_config_are_not(compressed_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(compressed_folder, folder)
    edit_json(folder / "config.json", lambda config: config.update(transformers_version="9.9.9", _name_or_path="here"))
    inspect_folder(folder)
    model, _ = load(str(folder))
    model.save_pretrained(tmp_path / "again")  # what is loaded is sealed again with the config that is written
    inspect_folder(tmp_path / "again")


def test_a_changed_setting_can_be_kept(compressed_folder, tmp_path):
    """The way out that the error names."""
    model = AutoModelForCausalLM.from_pretrained(compressed_folder, rms_norm_eps=0.25)
    model.save_pretrained(tmp_path / "again")
    inspect_folder(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").config.rms_norm_eps == 0.25


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 7])
def test_earlier_versions_are_read_and_saved_in_the_present_one(version, compressed_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(compressed_folder, folder)
    age(folder, version)
    assert inspect_folder(folder).layers == inspect_folder(compressed_folder).layers
    old, _ = load(str(folder))
    new, _ = load(str(compressed_folder))
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(old(tokens).logits, new(tokens).logits)
    old.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["format_version"] == 8
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (compressed_folder / name).read_bytes()


@pytest.mark.parametrize("kind", json.loads((OLD / "expected.json").read_text()))
def test_values_on_a_grid_of_earlier_versions_are_the_same_numbers(kind, tmp_path):
    """Read, and saved again in the present form: bit for bit what the version that wrote them made of them."""
    expected = json.loads((OLD / "expected.json").read_text())[kind]
    for folder in (OLD / kind, tmp_path / "again"):
        assert {layer.name for layer in inspect_folder(folder).layers} == set(expected)
        model = AutoModelForCausalLM.from_pretrained(folder)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, SlabLinear)}
        found = {name: layer.packed.dense().numpy().tobytes() for name, layer in layers.items()}
        assert {n: hashlib.blake2b(data, digest_size=8).hexdigest() for n, data in found.items()} == expected
        if folder.parent == OLD:
            model.save_pretrained(tmp_path / "again")
    entries = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert not any("value_bits" in module for module in entries["modules"].values())


def test_taking_the_digest_out_is_no_way_around_it(compressed_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(compressed_folder, folder)
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(format_version=3))
    refused(folder, "config.json says format version 3, the files have version 8")
    edit_record(folder / "model.safetensors", lambda record: record.pop("modules"))
    refused(folder, "carries no slablm digests")


@pytest.mark.parametrize("part", ["values", "left", "right", "states", "symbols", "scales", "levels"])
def test_every_part_is_compared_with_the_header(part, compressed_folder, symbol_folder, tmp_path):
    """A header may be wrong and its digests as well: what does not fit the config is refused before it is read."""
    folder = tmp_path / "copy"
    symbols = part in {"symbols", "scales", "levels"}
    shutil.copytree(symbol_folder if symbols else compressed_folder, folder)
    if not symbols:
        age(folder, 3)

    def flatten(header):
        names = [name for name in header if name.endswith(f".{part}")]
        assert names, sorted(header)
        for name in names:
            shape = header[name]["shape"]
            header[name]["shape"] = [1, *shape] if len(shape) == 1 else [shape[0] * shape[1]]

    edit_header(folder / "model.safetensors", flatten)
    refused(folder, r"config\.json says|number of dimensions|cannot be read")


@pytest.mark.parametrize("weights", ["other.safetensors", ["x"], {}, 3, ""])
def test_other_weights_than_its_own(weights, compressed_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(compressed_folder, folder)
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    edit_json(folder / "config.json", lambda config: config.update(transformers_weights=weights))
    for read in (inspect_folder, lambda path: load(str(path))):
        with pytest.raises(SlabError, match="transformers_weights is not what slablm writes"):
            read(folder)
