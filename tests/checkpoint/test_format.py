"""FORMAT.md is enough: a reader made from it alone finds every digest right and every weight the same, bit for bit."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from slablm import SlabLinear
from slablm.api import compress_folder
from slablm.compression.options import RunOptions
from tests.checkpoint import second_reader
from tests.checkpoint.folders import edit_json
from tests.compression.folders import build

KINDS = {
    "16-bit values": ("llama", {}, {}, "states"),
    "two factors, bfloat16": ("llama-tied", {"rank": 2, "value_dtype": "bfloat16"}, {}, "states"),
    "positions alone": ("llama", {"method": "wanda"}, {}, "positions"),
    "symbols": ("llama-tied", {"method": "slab+", "ratio": None}, {}, "symbols"),
    "symbols of many bits": ("llama", {"method": "slab+", "ratio": None, "bits_per_weight": 6.0}, {}, "levels"),
    "symbols of 6 bits": ("llama", {"method": "slab+", "ratio": None, "bits_per_weight": 16.0}, {}, "levels"),
    "int8 rows": ("llama", {"head_bits": 8}, {}, "scales"),
    "tied int8 rows": ("gemma3_text", {"head_bits": 8}, {"max_shard_size": 60_000}, "scales"),
    "several files": ("llama-tied", {}, {"max_shard_size": 60_000}, "states"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_reader(kind, quick, tmp_path):
    family, settings, options, part = KINDS[kind]
    source = build(tmp_path / "dense", family)
    compress_folder(str(source), tmp_path / "out", replace(quick, **settings), RunOptions(**options))
    reader = second_reader.Reader(tmp_path / "out")
    assert any(name.endswith(f".{part}") for name in reader.tensors)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SlabLinear)}
    assert layers.keys() == reader.modules.keys()
    if kind == "symbols of 6 bits":
        assert reader.entries["format_version"] == 10
    for name, layer in layers.items():
        expected, found = layer.packed.dense().numpy(), reader.dense(name)
        assert found.dtype == expected.dtype == np.float32
        assert np.array_equal(found, expected), name
    for name in reader.int8_rows:
        rows = model.get_submodule(name)
        expected = rows.weight.float() * rows.scales.float()[:, None]
        assert np.array_equal(reader.from_int8(name), expected.numpy()), name
    for name, tensor in model.state_dict().items():
        if name in reader.tensors and reader.tensors[name][0] in {"F32", "F16", "BF16"} and tensor.is_floating_point():
            assert np.array_equal(reader.numbers(name), tensor.float().numpy()), name


def test_the_second_reader_knows_nothing_of_slablm():
    tree = ast.parse(Path(second_reader.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names == {"hashlib", "json", "struct", "numpy"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))


def test_the_second_reader_looks_at_the_digests(compressed_folder, tmp_path):
    import shutil

    shutil.copytree(compressed_folder, tmp_path / "copy")
    edit_json(tmp_path / "copy" / "config.json", lambda config: config.update(rms_norm_eps=0.5))
    with pytest.raises(AssertionError):
        second_reader.Reader(tmp_path / "copy")
