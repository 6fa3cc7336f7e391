"""Loading through transformers: with slablm in any import order, without it, and from damaged configs."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from slablm import SlabError, SlabLinear
from slablm.checkpoint.hf import SlabQuantizationConfig
from slablm.checkpoint.inspection import inspect_folder
from slablm.checkpoint.layer_report import error_summary
from slablm.runtime import kernels
from tests.checkpoint.folders import age


def run_python(code):
    """A process in which only the code's own imports tell transformers of slablm."""
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


LOAD = "AutoModelForCausalLM.from_pretrained({folder!r})"


def test_without_slablm_loading_is_an_error_with_a_hint(compressed_folder):
    done = run_python(f"from transformers import AutoModelForCausalLM\n{LOAD.format(folder=str(compressed_folder))}")
    assert done.returncode != 0
    assert "pip install slablm" in done.stderr.splitlines()[-1]
    assert "import slablm" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("imports", ["import slablm, transformers", "import transformers.quantizers, slablm"])
def test_import_order_does_not_matter(compressed_folder, imports):
    load = LOAD.format(folder=str(compressed_folder))
    done = run_python(f"{imports}\nfrom transformers import AutoModelForCausalLM\n{load}\nprint('loaded')")
    assert done.stdout.strip() == "loaded", done.stderr


def test_importing_slablm_is_cheap():
    done = run_python("import sys, slablm, slablm.cli\nprint('torch' in sys.modules, 'transformers' in sys.modules)")
    assert done.stdout.strip() == "False False", done.stderr


def test_loaded_layers_run_on_the_compiled_kernels(compressed_folder, monkeypatch):
    tokens = torch.arange(20)[None]
    monkeypatch.setenv("SLABLM_KERNEL", "reference")
    reference = AutoModelForCausalLM.from_pretrained(compressed_folder)
    assert reference.model.layers[0].mlp.up_proj.native is None
    monkeypatch.delenv("SLABLM_KERNEL")
    if kernels.backend().library is None:
        pytest.skip(kernels.explain())
    native = AutoModelForCausalLM.from_pretrained(compressed_folder)
    assert native.model.layers[0].mlp.up_proj.native is not None
    with torch.no_grad():
        for part in (tokens, tokens[:, :1]):  # many tokens and one: different kernels
            assert torch.allclose(native(part).logits, reference(part).logits, rtol=1e-4, atol=1e-5)


def test_offloaded_layers_keep_their_packed_buffers(compressed_folder, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(compressed_folder, device_map=places, offload_folder=tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(compressed_folder)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(offloaded(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-5)


def test_loaded_layers_are_packed(compressed_folder):
    model = AutoModelForCausalLM.from_pretrained(compressed_folder)
    layers = [module for module in model.modules() if isinstance(module, SlabLinear)]
    assert len(layers) == 14
    assert not hasattr(model.config, "transformers_weights")


@pytest.fixture
def damaged(compressed_folder, tmp_path):
    """A copy of the checkpoint whose quantization_config the test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(compressed_folder, folder)

    def change(edit):
        config = json.loads((folder / "config.json").read_text())
        edit(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


def test_a_format_from_the_future_is_refused(damaged):
    folder = damaged(lambda config: config.update(format_version=99))
    with pytest.raises(SlabError, match="format version 99 is not supported.*upgrade slablm"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_format_2_has_no_errors_on_unseen_text(damaged, compressed_folder):
    def forget(config):
        for module in config["modules"].values():
            assert module.pop("unseen_error") > 0

    folder = age(damaged(forget), 2)
    old, new = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, compressed_folder))
    assert torch.equal(old(torch.tensor([[5, 6, 7]])).logits, new(torch.tensor([[5, 6, 7]])).logits)
    assert [layer.unseen_error for layer in inspect_folder(folder).layers] == [None] * 14
    assert error_summary(inspect_folder(folder).layers)["unseen_error"] is None


def test_format_4_has_no_drift(damaged, compressed_folder, tmp_path):
    folder = age(damaged(lambda config: config.pop("drift")), 4)
    assert inspect_folder(folder).drift == ()
    assert inspect_folder(folder).to_dict()["drift"] is None
    assert len(inspect_folder(compressed_folder).drift) == 2
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")  # and it stays without
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 8
    assert "drift" not in config


def test_the_drift_is_kept_when_a_model_is_saved_again(compressed_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(compressed_folder).save_pretrained(tmp_path / "again")
    again, before = inspect_folder(tmp_path / "again").drift, inspect_folder(compressed_folder).drift
    assert again == before
    assert all(0 < number < 1 for block in before for number in (block.first, block.rest))


def test_unknown_entries_are_refused(damaged):
    folder = damaged(lambda config: config.update(surprise=1))
    with pytest.raises(SlabError, match="unknown entry 'surprise'"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_layer_that_the_model_lacks(compressed_folder):
    with pytest.raises(SlabError, match=r"lists a compressed layer 'model\.layers\.1\.\w+\.\w+' that Llama"):
        AutoModelForCausalLM.from_pretrained(compressed_folder, num_hidden_layers=1)


def test_missing_fields_are_refused():
    with pytest.raises(SlabError, match="quantization_config is damaged"):
        SlabQuantizationConfig()
    with pytest.raises(SlabError, match="modules is damaged"):
        SlabQuantizationConfig({"a": {"kept": 1}}, "float16")
    with pytest.raises(SlabError, match="value_dtype missing"):
        SlabQuantizationConfig({"a": {"kept": 1, "rank": 1, "signs": True, "output_error": 0.1}})
