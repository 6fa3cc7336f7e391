import pytest
import torch
from transformers import AutoModelForCausalLM

import slablm
from slablm import CompressionConfig, SlabError
from slablm.checkpoint.inspection import inspect_folder


def test_compress_by_folder_and_reload(tiny_folder, quick, tmp_path):
    seen = []
    model = slablm.compress(str(tiny_folder), quick, on_layer=lambda done, total, report: seen.append((done, total)))
    assert seen == [(i + 1, 14) for i in range(14)]
    model.save_pretrained(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, model(tokens).logits)
    # The embedding was rounded in memory as it is stored.
    assert torch.equal(reloaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_compress_a_model_object(tiny_model, tokenizer, quick):
    assert slablm.compress(tiny_model, quick, tokenizer=tokenizer) is tiny_model
    with pytest.raises(SlabError, match="already compressed by slablm"):
        slablm.compress(tiny_model, quick, tokenizer=tokenizer)


def test_tokenizer_is_found_where_the_model_came_from(tiny_folder, quick):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    slablm.compress(model, quick)
    assert model.is_quantized


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "slab"},
        {"method": "wanda"},
        {"method": "magnitude"},
        {"method": "slab+", "ratio": None},
        {"method": "slab+", "ratio": None, "bits_per_weight": 3.0},
        {"method": "slab+", "ratio": None, "bits_per_weight": 5.0, "value_dtype": "bfloat16"},
    ],
)
def test_saving_a_loaded_model_again_changes_nothing(tiny_model, tokenizer, quick, settings, tmp_path):
    from dataclasses import replace

    slablm.compress(tiny_model, replace(quick, **settings), tokenizer=tokenizer).save_pretrained(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_symbols_are_the_same_model_after_loading(tiny_model, tokenizer, quick_plus, tmp_path):
    model = slablm.compress(tiny_model, quick_plus, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokens = torch.arange(12)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    report = inspect_folder(tmp_path / "a")
    mean = sum(layer.true_bits for layer in report.layers) / sum(layer.weights for layer in report.layers)
    assert 4.8 < mean <= 5.0  # what was asked for in total
    assert len({layer.symbol_bits for layer in report.layers}) > 1  # and uneven


def test_nan_in_a_weight_names_the_tensor(tiny_model, tokenizer, quick):
    tiny_model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(SlabError, match=r"NaN or Inf in model\.layers\.1\.mlp\.up_proj\.weight"):
        slablm.compress(tiny_model, quick, tokenizer=tokenizer)


def test_overflowing_activations_name_the_layer(tiny_model, tokenizer, quick):
    tiny_model.model.layers[0].post_attention_layernorm.weight.data[:] = 3e38
    with pytest.raises(SlabError, match=r"NaN or Inf in the inputs of layer model\.layers\.0\.mlp"):
        slablm.compress(tiny_model, quick, tokenizer=tokenizer)


def test_an_impossible_ratio_names_the_layer(tiny_model, tokenizer, quick):
    from dataclasses import replace

    with pytest.raises(SlabError, match=r"model\.layers\.0\.self_attn\.q_proj: ratio 0\.93 keeps no entry.*at most"):
        slablm.compress(tiny_model, replace(quick, ratio=0.93), tokenizer=tokenizer)


def test_embedding_that_overflows_float16(tiny_model, tokenizer, quick):
    tiny_model.model.embed_tokens.weight.data[5, 5] = 1e6
    with pytest.raises(SlabError, match=r"model\.embed_tokens\.weight: a value does not fit into torch.float16"):
        slablm.compress(tiny_model, quick, tokenizer=tokenizer)


def test_bfloat16_models_store_bfloat16(tiny_folder, tokenizer, quick, tmp_path):
    # Not .to(bfloat16), which would also round the rotary frequencies that loading keeps in float32.
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    model = slablm.compress(dense, quick, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.dtype == torch.bfloat16
    assert reloaded.model.layers[0].mlp.up_proj.packed.values.dtype == torch.bfloat16
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, model(tokens).logits)


def test_a_foreign_quantized_model_is_refused(tiny_model, tokenizer, quick):
    tiny_model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(SlabError, match="already quantized"):
        slablm.compress(tiny_model, quick, tokenizer=tokenizer)


def test_unknown_method(tiny_model, tokenizer):
    with pytest.raises(SlabError, match="unknown method 'magic': choose one of slab"):
        slablm.decompose(torch.randn(8, 16), config=CompressionConfig(method="magic"))


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = slablm.nonsense
