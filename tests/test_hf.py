"""Loading through transformers: with slablm in any import order, without it, and from damaged configs."""

import json
import shutil
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from slablm import SlabError, SlabLinear
from slablm.hf import SlabQuantizationConfig


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


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


def test_unknown_entries_are_refused(damaged):
    folder = damaged(lambda config: config.update(surprise=1))
    with pytest.raises(SlabError, match="unknown entry 'surprise'"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_layer_that_the_model_lacks(damaged):
    def rename(config):
        config["modules"]["model.layers.9.mlp.up_proj"] = config["modules"].pop("model.layers.0.mlp.up_proj")

    with pytest.raises(SlabError, match=r"lists a compressed layer 'model\.layers\.9\.mlp\.up_proj'"):
        AutoModelForCausalLM.from_pretrained(damaged(rename))


def test_missing_fields_are_refused():
    with pytest.raises(SlabError, match="quantization_config is damaged"):
        SlabQuantizationConfig()
    with pytest.raises(SlabError, match="modules is damaged"):
        SlabQuantizationConfig(modules={"a": {"kept": 1}})
