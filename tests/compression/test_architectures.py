"""The same code on every decoder family: tiny random models, compressed, saved, reloaded, compared."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from slablm import CompressionConfig, SlabError, SlabLinear
from slablm.api import compress_model
from slablm.dense.targets import select_targets

SMALL = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    # Blocks of two kinds, each with arguments of its own.
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "phi": {},
    "phi3": {},
}
LINEARS_PER_BLOCK = {"opt": 6, "gpt_neox": 4, "phi": 6, "phi3": 4}


def tiny(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.removesuffix("-tied"), **SMALL, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_compress_save_reload(family, tmp_path):
    model = tiny(family)
    windows = torch.randint(3, 200, (3, 24), generator=torch.Generator().manual_seed(0))
    dense_logits = model(windows).logits
    config = CompressionConfig("slab", ratio=0.4, num_samples=3, seq_len=24, iterations=4)
    targets = select_targets(model, config)
    reports = compress_model(model, targets, windows, config)
    assert len(reports) == 2 * LINEARS_PER_BLOCK.get(family, 7)
    assert targets.left_dense == {}
    assert sum(isinstance(module, SlabLinear) for module in model.modules()) == len(reports)
    logits = model(windows).logits
    assert 0 < (logits - dense_logits).norm() / dense_logits.norm() < 0.9
    model.save_pretrained(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(reloaded(windows).logits, logits)
    # A tied embedding is stored once, and in 16 bits like the values.
    stored = load_file(tmp_path / "out" / "model.safetensors")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    matrices = [tensor for tensor in stored.values() if tensor.ndim == 2 and 200 in tensor.shape]
    assert len(matrices) == (1 if tied else 2)
    assert {tensor.dtype for tensor in matrices} == {torch.float16}


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
@torch.no_grad()
def test_propagation_equals_the_whole_model(family, monkeypatch):
    """With a method that changes nothing, the walk over the blocks must give the model's own activations."""
    from slablm.compression import blocks, layer
    from slablm.methods import METHODS, Method
    from slablm.methods.decomposition import Decomposition

    def lossless(weight, stats, config):
        m, n = weight.shape
        norms[len(norms)] = stats.input_norms
        empty = weight.new_empty
        return Decomposition(torch.ones(m, n, dtype=torch.bool), weight.float(), empty(m, 0), empty(0, n), None)

    norms = {}
    monkeypatch.setitem(METHODS, "lossless", Method(lossless))
    # No rounding: the comparison below is exact up to float32.
    monkeypatch.setattr(layer, "value_dtype", lambda config, dtype: torch.float32)
    model = tiny(family)
    windows = torch.randint(3, 200, (3, 24), generator=torch.Generator().manual_seed(0))
    expected = {}
    targets = select_targets(model, CompressionConfig())
    names = [name for block in targets.names for name in block]
    squares = dict.fromkeys(names, 0.0)
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: squares.__setitem__(
                name, squares[name] + args[0].reshape(-1, args[0].shape[-1]).square().sum(0)
            )
        )
        for name in names
    ]
    for window in windows:
        model(window[None])
    for handle in handles:
        handle.remove()
    expected = {name: value.sqrt() for name, value in squares.items()}
    blocks.compress_blocks(model, targets, windows, CompressionConfig(method="lossless"))
    for index, name in enumerate(names):
        assert torch.allclose(norms[index], expected[name], rtol=1e-4, atol=1e-5), name


def test_conv1d_models_are_refused_with_the_reason():
    config = AutoConfig.for_model("gpt2", vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(SlabError, match="matches no linear layer.*'transformer.h.0.attn.c_attn'"):
        select_targets(model, CompressionConfig())
