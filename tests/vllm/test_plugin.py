"""The plug-in without an engine: on vLLM's own classes where it is installed, else on the little of them it uses."""

import importlib.util
import random
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from slablm import SlabError, decompose
from slablm.checkpoint.entries import ModuleSpec
from slablm.methods.rotation import Rotation
from slablm.packing import pack
from slablm.vllm import plugin
from tests.runtime.kernels.weights import random_symbols

INSTALLED = importlib.util.find_spec("vllm") is not None


class Logger:
    """vLLM's, which can say a thing once."""

    def __init__(self):
        self.said = []

    def info_once(self, text, *arguments):
        self.said.append(text % arguments)

    warning_once = info_once


def register(name):
    return lambda kind: kind


STAND_INS = {
    "vllm": {},
    "vllm.config": {"get_current_vllm_config": None},
    "vllm.logger": {"init_logger": lambda name: Logger()},
    "vllm.model_executor": {},
    "vllm.model_executor.layers": {},
    "vllm.model_executor.layers.linear": {
        "LinearMethodBase": object,
        "UnquantizedLinearMethod": type("UnquantizedLinearMethod", (), {}),
        **{name: type(name, (nn.Module,), {}) for name in ("LinearBase", "QKVParallelLinear")},
        "MergedColumnParallelLinear": type("MergedColumnParallelLinear", (nn.Module,), {}),
    },
    "vllm.model_executor.layers.quantization": {"register_quantization_config": register},
    "vllm.model_executor.layers.quantization.base_config": {
        "QuantizationConfig": type("QuantizationConfig", (), {"packed_modules_mapping": {}}),
        "QuantizeMethodBase": object,
    },
    "vllm.model_executor.layers.vocab_parallel_embedding": {
        "VocabParallelEmbedding": type("VocabParallelEmbedding", (nn.Module,), {})
    },
}


@pytest.fixture(autouse=True)
def interface(monkeypatch):
    """Modules of slablm made with these classes are forgotten afterwards."""
    if INSTALLED:
        return
    for name, members in STAND_INS.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("quantization", "linear", "embedding"):
        monkeypatch.delitem(sys.modules, f"slablm.vllm.{name}", raising=False)


def settings(devices=1, adapters=None):
    return SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=devices), lora_config=adapters)


def kept_entries(m):
    return pack(decompose(torch.randn(m, 64), ratio=0.4), torch.float16)


def fused(weights, dtype=torch.float32):
    """A layer as vLLM fuses it, its containers empty, and its method."""
    from slablm.vllm.linear import SlabLinearMethod

    stored = {
        name: None if isinstance(weight, torch.Tensor) else ModuleSpec.of(weight.spec, torch.float16, 0.0, None)
        for name, weight in weights.items()
    }
    layer = nn.Module()
    layer.params_dtype, layer.quant_method = dtype, SlabLinearMethod(stored, torch.float16)
    rows = [len(weight.dense() if stored[name] else weight) for name, weight in weights.items()]
    layer.quant_method.create_weights(layer, 64, rows, 64, sum(rows), dtype, weight_loader=None)
    return layer


def parts_of(weight):
    return {"weight": weight} if isinstance(weight, torch.Tensor) else weight.parts()


def load(layer, weights, shards, left_out=()):
    """Hand the tensors over one by one, in any order, as vLLM's loaders do."""
    tensors = [
        (part, tensor, shard)
        for shard, weight in zip(shards, weights.values(), strict=True)
        for part, tensor in parts_of(weight).items()
        if (shard, part) not in left_out
    ]
    random.Random(0).shuffle(tensors)
    for part, tensor, shard in tensors:
        parameter = getattr(layer, part)
        parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))


@pytest.fixture(scope="module")
def weights():
    """Budgets of their own, both forms, and one that is not compressed."""
    return {
        "a.q_proj": random_symbols(48, 64, 3, Rotation(64, 32, 7), seed=0),
        "a.k_proj": kept_entries(16),
        "a.v_proj": torch.randn(16, 64),
    }


@pytest.mark.parametrize("kernel", ["", "reference"])
@pytest.mark.parametrize("shards", ["qkv", [0, 1, 2]])
def test_a_fused_layer_is_its_parts_side_by_side(weights, shards, kernel, monkeypatch):
    monkeypatch.setenv("SLABLM_KERNEL", kernel)
    layer = fused(weights)
    load(layer, weights, shards)
    layer.quant_method.process_weights_after_loading(layer)
    assert not list(layer.named_parameters(recurse=False))
    inputs, bias = torch.randn(5, 64), torch.randn(80)
    dense = torch.cat([weight if isinstance(weight, torch.Tensor) else weight.dense() for weight in weights.values()])
    outputs = layer.quant_method.apply(layer, inputs, bias)
    assert torch.allclose(outputs, functional.linear(inputs, dense, bias), rtol=1e-2, atol=1e-2)
    kinds = [type(container).__name__ for container in layer.containers]
    assert kinds == (["Linear"] * 3 if kernel else ["SymbolLinear", "RowLinear", "Linear"])


def test_a_layer_that_is_one_in_the_checkpoint_is_one_here(weights):
    """Phi-3's qkv_proj: three to vLLM, one in the files."""
    from slablm.vllm.linear import SlabLinearMethod

    weight = weights["a.q_proj"]
    layer = nn.Module()
    method = SlabLinearMethod({"a.qkv_proj": ModuleSpec.of(weight.spec, torch.float16, 0.0, None)}, torch.float16)
    layer.params_dtype, layer.quant_method = torch.float32, method
    method.create_weights(layer, 64, [16, 16, 16], 64, 48, torch.float32)
    load(layer, {"a.qkv_proj": weight}, [None])
    method.process_weights_after_loading(layer)
    inputs = torch.randn(2, 64)
    assert torch.allclose(method.apply(layer, inputs), inputs @ weight.dense().T, rtol=1e-2, atol=1e-2)


def test_what_is_not_loaded_is_named(weights):
    layer = fused(weights)
    load(layer, weights, "qkv", left_out=[("k", "left")])
    with pytest.raises(SlabError, match="vLLM's model did not load 'a.k_proj.left'"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_tensor_of_another_shape_is_named(weights):
    layer = fused(weights)
    with pytest.raises(SlabError, match=r"'a.v_proj.weight' is \[8, 64\], vLLM's model has \[16, 64\] there"):
        layer.weight.weight_loader(layer.weight, torch.zeros(8, 64), "v")
    with pytest.raises(SlabError, match=r"'a.v_proj.scales' is \[16\], vLLM's model has nothing there"):
        layer.scales.weight_loader(layer.scales, torch.zeros(16), "v")


def test_damage_is_found_without_kernels_too(weights, monkeypatch):
    monkeypatch.setenv("SLABLM_KERNEL", "reference")
    layer = fused(weights)
    load(layer, weights, "qkv")
    layer.containers[0].scales.fill_(-1)
    with pytest.raises(SlabError, match="a.q_proj: corrupted scales"):
        layer.quant_method.process_weights_after_loading(layer)


def test_tied_int8_rows_are_one(monkeypatch):
    from slablm.vllm.embedding import Int8RowsMethod

    method, embedding, head = Int8RowsMethod(), nn.Module(), nn.Module()
    for layer in (embedding, head):
        layer.params_dtype = torch.float32
        method.create_weights(layer, 64, [128], 64, 128, torch.float32, weight_loader=None)
    with pytest.raises(SlabError, match="did not load the scales"):
        method.process_weights_after_loading(embedding)
    head = method.tie_weights(head, embedding)
    embedding.weight.data.random_(-127, 128)
    embedding.scales.data.uniform_(0, 0.01)
    method.process_weights_after_loading(head)
    dense = embedding.weight.float() * embedding.scales.float()[:, None]
    inputs, tokens = torch.randn(3, 64), torch.tensor([[5, 127], [0, 5]])
    assert torch.allclose(method.apply(head, inputs), inputs @ dense.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(method.embedding(embedding, tokens), dense[tokens])


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (settings(devices=2), "--tensor-parallel-size 2 would split compressed layers.*: use --tensor-parallel-size 1"),
        (settings(adapters=object()), "--enable-lora does not go with layers compressed by slablm: leave it out"),
    ],
)
def test_refused_engines(engine, message):
    from slablm.vllm.quantization import check_engine

    with pytest.raises(SlabError, match=message):
        check_engine(engine)
    check_engine(settings())


def test_refused_checkpoints():
    from slablm.vllm.quantization import SlabConfig

    weight = kept_entries(16)
    entry = ModuleSpec.of(weight.spec, torch.float16, 0.0, None).to_dict()
    config = {"modules": {"b.0.up_proj": entry}, "value_dtype": "float16", "format_version": 9, "experts": ["b"]}
    with pytest.raises(SlabError, match="vLLM cannot run the experts in 'b' as slablm stores them"):
        SlabConfig.from_config(config)
    with pytest.raises(SlabError, match="checkpoint format version 99 is not supported"):
        SlabConfig.from_config(config | {"format_version": 99})


@pytest.mark.skipif(INSTALLED, reason="there is nothing wrong with it")
def test_another_interface_is_a_warning(monkeypatch):
    """vLLM calls the plug-in whatever model it serves."""
    monkeypatch.delattr(sys.modules["vllm.model_executor.layers.quantization"], "register_quantization_config")
    with pytest.warns(RuntimeWarning, match="cannot announce its format to vLLM: .*register_quantization_config"):
        plugin.register()


def test_registered_as_often_as_one_likes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugin.register()
        plugin.register()
