"""Mixtures of experts on the command line: lines that experts share, the whole model's bits, and what is refused."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.cli.test_cli import refused, slablm
from tests.compression.mixtures import SMALL, build
from tests.conftest import byte_tokenizer


@pytest.fixture
def options(text_file):
    return ["--method", "slab", "--calibration", text_file, "--num-samples", 2, "--seq-len", 24, "--iterations", 2]


def test_experts_share_lines(options, tmp_path):
    folder, out = build(tmp_path / "dense", "mixtral"), tmp_path / "out"
    planned = slablm("plan", folder, out, *options)
    text = " ".join(planned.stdout.split())
    assert "mlp.experts.down_proj 8 64×64" in text
    assert "left dense: mlp.gate (MixtralTopKRouter is not a plain nn.Linear), 2 times" in text
    predicted = json.loads(slablm("plan", folder, out, *options, "--json").stdout)
    done = slablm("compress", folder, out, *options, "--json")
    result = json.loads(done.stdout)
    assert result["model_bits_per_weight"] == predicted["model_bits_per_weight"]
    assert f"true bits per weight of the whole model {predicted['model_bits_per_weight']:.3f}" in text
    assert predicted["model_weights"] == AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert len(result["rarely_chosen"]) == 8
    assert "calibration tokens were sent to model.layers.0.mlp.experts.0 (" in done.stderr
    shown = slablm("inspect", out).stdout
    assert shown.count("experts.*") == 6
    inside = json.loads(slablm("inspect", out, "--json").stdout)
    assert len(inside["tensors"]) == 2 * (4 + 4 * 3)
    assert inside["model_bits_per_weight"] == pytest.approx(8 * inside["file_bytes"] / inside["model_weights"])
    assert f"{inside['model_bits_per_weight']:.3f} in the whole model" in " ".join(shown.split())
    card = (out / "README.md").read_text()
    assert f"| the same of the whole model (files over all weights) | {inside['model_bits_per_weight']:.3f} |" in card


def test_a_model_of_other_experts_is_refused(options, tmp_path):
    folder, out = tmp_path / "dense", tmp_path / "out"
    sizes = {"num_local_experts": 4, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1, "head_dim": 32}
    config = AutoConfig.for_model("llama4_text", **SMALL | sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    line = (
        r"only \d+\.\d % of the blocks' weights can be compressed \(Llama4TextExperts is not a plain nn.Linear\): "
        "give --mostly-dense"
    )
    refused(slablm("compress", folder, out, *options), line)
    planned = slablm("plan", folder, out, *options)
    assert planned.returncode == 1
    assert "give --mostly-dense to go on with these" in " ".join(planned.stdout.split())
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    assert slablm("plan", folder, out, *options, "--mostly-dense").returncode == 0
    done = slablm("compress", folder, out, *options, "--mostly-dense")
    assert done.returncode == 0, done.stderr
