"""Compressed models under accelerate's device maps: offloaded, split, and fetched back; logits as without."""

import accelerate
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM

from slablm import SlabLinear
from slablm.runtime import kernels
from slablm.runtime.narrow import NarrowEmbedding, NarrowLinear
from tests.compression.folders import build

OUTSIDE = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
TOKENS = torch.arange(20)[None]


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens).logits


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def folder(request, tmp_path_factory, text_file):
    """A compressed model, its head tied to the embedding or not, its linear layers with biases or not."""
    from slablm.cli.compress import run
    from slablm.compression.options import RunOptions
    from slablm.config import CompressionConfig

    place = tmp_path_factory.mktemp("placement")
    source = build(place / "dense", request.param)
    # One with kept entries, one with symbols.
    size = {"method": "slab"} if request.param == "llama" else {"bits_per_weight": 5.0}
    config = CompressionConfig(**size, calibration=str(text_file), num_samples=4, seq_len=32, iterations=2)
    run(str(source), place / "out", config, RunOptions())
    return place / "out"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def assert_same(model, folder):
    plain = load(folder)
    for part in (TOKENS, TOKENS[:, :1]):  # many tokens and one: different kernels
        for _ in range(2):  # weights come and go: the second time they lie elsewhere
            # Layers that move run on the reference, the others on kernels, which round inputs to 14 bits.
            torch.testing.assert_close(logits(model, part), logits(plain, part), rtol=1e-3, atol=5e-4)


MAPS = {
    "one block on disk": {"model.layers.0": "cpu", "model.layers.1": "disk"},
    "all blocks on disk": {"model.layers": "disk"},
    "half a block on disk": {
        "model.layers.0": "cpu",
        "model.layers.1.self_attn": "cpu",
        "model.layers.1.mlp": "disk",
        "model.layers.1.input_layernorm": "cpu",
        "model.layers.1.post_attention_layernorm": "disk",
    },
}


@pytest.mark.parametrize("case", MAPS)
def test_device_maps_with_offloading(case, folder, tmp_path):
    model = load(folder, device_map=OUTSIDE | MAPS[case], offload_folder=tmp_path)
    offloaded = [m for m in model.modules() if isinstance(m, SlabLinear) and hasattr(m, "_hf_hook")]
    assert offloaded
    assert not any(layer.runs_native for layer in offloaded)
    assert_same(model, folder)


def test_embedding_and_head_on_disk(folder, tmp_path):
    if AutoConfig.from_pretrained(folder).tie_word_embeddings and Version(accelerate.__version__) < Version("1.15"):
        pytest.skip("accelerate loses tied tensors that lie on the disk before version 1.15")
    places = dict.fromkeys(OUTSIDE, "disk") | {"model.rotary_emb": "cpu", "model.layers": "cpu"}
    model = load(folder, device_map=places, offload_folder=tmp_path)
    assert not any(isinstance(module, NarrowEmbedding | NarrowLinear) for module in model.modules())
    assert_same(model, folder)


def test_everything_on_one_device(folder):
    assert_same(load(folder, device_map={"": "cpu"}), folder)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_cpu_offload_of_a_loaded_model(folder, offload_buffers):
    model = load(folder)
    assert_same(cpu_offload(model, execution_device="cpu", offload_buffers=offload_buffers), folder)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_disk_offload_of_a_loaded_model(folder, offload_buffers, tmp_path):
    model = load(folder)
    assert_same(disk_offload(model, tmp_path, execution_device="cpu", offload_buffers=offload_buffers), folder)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_dispatch_of_a_loaded_model(folder, offload_buffers, tmp_path):
    model = load(folder)
    places = OUTSIDE | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    dispatched = dispatch_model(
        model, places, main_device="cpu", offload_dir=str(tmp_path), offload_buffers=offload_buffers
    )
    assert_same(dispatched, folder)


def test_kernels_are_used_where_nothing_moves(folder, tmp_path):
    if kernels.backend().library is None:
        pytest.skip(kernels.explain())
    model = load(folder, device_map=OUTSIDE | MAPS["one block on disk"], offload_folder=tmp_path)
    native = {name: m.runs_native for name, m in model.named_modules() if isinstance(m, SlabLinear)}
    moved = {name for name in native if hasattr(model.get_submodule(name), "_hf_hook") and "layers.1." in name}
    assert len(moved) == 7
    assert not any(native[name] for name in moved)
