"""The path of a token: models generate what they would without it, and it is left where something else is asked for."""

import copy
import inspect
import io

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn.utils import parametrize
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache

from slablm.methods.rotation import Rotation, largest_block
from slablm.runtime.block_run import BlockRuns
from slablm.runtime.kernels import backends, native
from slablm.runtime.linear import SlabLinear
from slablm.runtime.replace_module import replace_module
from slablm.runtime.token_path import use_token_path
from tests.compression.test_architectures import FAMILIES, SMALL
from tests.runtime.kernels.weights import random_symbols

KNOWN = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma3_text")
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
PROMPT, TOKENS = 5, 12
# The name has changed in transformers 5.2x.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"

pytestmark = pytest.mark.skipif(isinstance(native.load(), str), reason="no compiled kernels")


def model_of(family="llama", dtype=torch.float32, **changes):
    """A model whose blocks are in random symbols, rotated or not; norms and biases are random too."""
    config = AutoConfig.for_model(family.removesuffix("-tied"), **(SMALL | FAMILIES[family] | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 0
    layers = [(name, part) for name, part in model.named_modules() if type(part) is nn.Linear and ".layers." in name]
    for i, (name, linear) in enumerate(layers):
        rows, columns = linear.weight.shape
        weight = random_symbols(
            rows, columns, 2 + i % 4, Rotation(columns, largest_block(columns), i) if i % 3 else None, i
        )
        weight.scales.mul_(2 * columns**-0.5)
        layer = SlabLinear.from_packed(weight, linear.bias)
        layer.use_native()
        replace_module(model, name, layer)
    return model.to(dtype).eval()


def model_on_path(*arguments, **changes):
    model = model_of(*arguments, **changes)
    assert use_token_path(model) == model.config.num_hidden_layers
    return model


def tokens_of(sequences=2, count=PROMPT + TOKENS):
    return torch.randint(3, SMALL["vocab_size"], (sequences, count), generator=torch.Generator().manual_seed(0))


def fed(model, tokens, cache=None, prompt=PROMPT, size=1, gradients=False, **kwargs):
    """Logits, [sequences, tokens, vocabulary], of a prompt and of what is behind it, a token or so many at a time."""
    kwargs[CACHE] = DynamicCache(config=model.config) if cache is None else cache
    steps = [chunk for chunk in (tokens[:, :prompt], *tokens[:, prompt:].split(size, dim=1)) if chunk.shape[1] > 0]
    with torch.set_grad_enabled(gradients):
        return torch.cat([model(step, **kwargs).logits for step in steps], dim=1)


def compared(run):
    """What a function gives with the path, what without, and how often the path was taken."""
    taken, step = [], BlockRuns.step

    def counted(*arguments):
        outputs = step(*arguments)
        taken.append(outputs is not None)
        return outputs

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(BlockRuns, "step", counted)
        with_path = run()
        patch.setattr(BlockRuns, "step", lambda *arguments: None)
        return with_path, run(), sum(taken)


def gone_on(cache, run):
    """The same behind what there is in a cache, of which the second run gets a copy."""
    caches = iter([cache, copy.deepcopy(cache)])
    return compared(lambda: run(next(caches)))


def error_of(given, expected):
    return ((given.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_alike(given, expected, dtype=None):
    assert (given.dtype, given.shape) == (expected.dtype, expected.shape)
    assert error_of(given, expected) <= TOLERANCES[dtype or expected.dtype]


def assert_caches_alike(given, expected):
    for own, other in zip(given.layers, expected.layers, strict=True):
        assert own.get_seq_length() == other.get_seq_length()
        assert_alike(own.keys, other.keys)
        assert_alike(own.values, other.values)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", KNOWN)
def test_generation_is_that_of_the_blocks(family, dtype, padded):
    """Tokens are given: else a tie that falls the other way would make all that follows differ."""
    changes = {"partial_rotary_factor": 0.5} if family == "phi3" else {}
    model, tokens = model_on_path(family, dtype, **changes), tokens_of(count=PROMPT + 20)
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, : 2 * padded] = 0

    def run():
        cache = DynamicCache(config=model.config)
        outputs = model.generate(
            tokens[:, :PROMPT],
            attention_mask=mask,
            max_new_tokens=20,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda sequence, text: [tokens[sequence, len(text)].item()],
            output_logits=True,
            return_dict_in_generate=True,
            **{CACHE: cache},
        )
        return torch.stack(outputs.logits), cache

    (logits, cache), (own_logits, own_cache), taken = compared(run)
    assert taken == 2 * 19
    assert_alike(logits, own_logits, dtype)  # which `generate` makes float32
    assert_caches_alike(cache, own_cache)


OTHER_SIZES = ({"hidden_size": 72}, {"intermediate_size": 100}, {"head_dim": 24}, {"hidden_act": "relu"})
OTHERS = [(family, {}) for family in ("gemma2", "gpt_neox", "opt", "phi")]


@pytest.mark.parametrize(("family", "changes"), OTHERS + [("llama", {"head_dim": 16} | sizes) for sizes in OTHER_SIZES])
def test_blocks_without_kernels_are_left_as_they_are(family, changes):
    assert use_token_path(model_of(family, **changes)) == 0


def test_dense_blocks_are_left_as_they_are_and_those_in_training_until_it_is_over(tiny_model):
    assert use_token_path(tiny_model) == 0
    model = model_of().train()
    assert use_token_path(model) == 0
    assert use_token_path(model.eval()) == use_token_path(model) == 2


def part_of(model, name=""):
    return model.model.layers[0].get_submodule(name)


def hook(name, way="register_forward_hook"):
    return lambda model: getattr(part_of(model, name), way)(lambda *arguments: None)


def accelerated(name):
    return lambda model: add_hook_to_module(part_of(model, name), ModelHook())


def put(name, make):
    return lambda model: replace_module(part_of(model), name, make(part_of(model, name)))


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def no_attention(module, query, *others, **kwargs):
    return query.transpose(1, 2) * 0, None


CHANGES = {
    "a hook on a projection": hook("self_attn.q_proj"),
    "a hook on the MLP": hook("mlp"),
    "a hook before a norm": hook("input_layernorm", "register_forward_pre_hook"),
    "a hook of accelerate on a projection": accelerated("self_attn.o_proj"),
    "a hook of accelerate on attention": accelerated("self_attn"),
    "a hook of accelerate on a norm": accelerated("input_layernorm"),
    "a forward of its own": lambda model: setattr(part_of(model, "mlp"), "forward", Double().forward),
    "a dense layer": put("mlp.down_proj", lambda layer: layer.unpacked(torch.float32)),
    "another activation": put("mlp.act_fn", lambda _: nn.ReLU()),
    "another norm": put("post_attention_layernorm", lambda norm: nn.Sequential(norm, Double())),
    "a computed norm": lambda model: parametrize.register_parametrization(
        part_of(model, "input_layernorm"), "weight", Double()
    ),
    "a layer off the kernels": lambda model: part_of(model, "mlp.gate_proj").use_packed(),
    "training": lambda model: model.train(),
    "attention that is something else": lambda model: setattr(model.config, "_attn_implementation", "nothing"),
}


@pytest.mark.parametrize("when", ["before", "between", "on a copy"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_was_changed_runs_itself(change, when, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "nothing", no_attention)
    model, tokens, cache = model_on_path(num_hidden_layers=1), tokens_of(), DynamicCache()
    assert compared(lambda: fed(model, tokens))[2] == TOKENS
    if when == "on a copy":
        model = copy.deepcopy(model)
    for step in ("change", "tokens")[:: -1 if when == "between" else 1]:
        if step == "change":
            CHANGES[change](model)
        else:
            fed(model, tokens[:, :8], cache)
    given, own, taken = gone_on(cache, lambda cache: fed(model, tokens[:, 8:], cache, prompt=0))
    assert torch.equal(given, own)
    assert taken == 0


def test_the_path_comes_back():
    model, tokens = model_on_path(num_hidden_layers=1), tokens_of()
    handle = hook("mlp")(model)
    part_of(model, "mlp.gate_proj").use_packed()
    fed(model.train(), tokens)
    handle.remove()
    part_of(model, "mlp.gate_proj").use_native()
    model.eval()
    given, own, taken = compared(lambda: fed(model, tokens))
    assert taken == TOKENS
    assert_alike(given, own)


@pytest.mark.parametrize("first", ["hook", "path"])
def test_a_hook_on_the_whole_block_is_called(first):
    class Turn(ModelHook):
        def post_forward(self, module, output):
            return -output

    model, plain = model_of(num_hidden_layers=1), model_of(num_hidden_layers=1)
    for step in ("hook", "path")[:: 1 if first == "hook" else -1]:
        use_token_path(model) if step == "path" else add_hook_to_module(part_of(model), Turn())
    add_hook_to_module(part_of(plain), Turn())
    assert_alike(fed(model, tokens_of()), fed(plain, tokens_of()))


def fed_on_the_reference(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.ENVIRONMENT_VARIABLE, backends.REFERENCE)
        return fed(model, tokens_of())


def called(model, tokens, *arguments):
    cache, inputs = DynamicCache(), torch.ones(1, tokens, SMALL["hidden_size"])
    fed(model, tokens_of(1, 4), cache)
    turns = model.model.rotary_emb(inputs, torch.arange(4, 4 + tokens)[None])
    return part_of(model)(inputs, *arguments, position_embeddings=turns, **{CACHE: cache})


OTHER_STEPS = {
    "gradients": lambda model: fed(model, tokens_of(), gradients=True),
    "two tokens": lambda model: fed(model, tokens_of(2, 8), prompt=2, size=2),
    "two tokens without a mask": lambda model: called(model, 2),
    "a mask without its name": lambda model: called(model, 1, torch.arange(5).view(1, 1, 1, 5) > 1),
    "nine sequences": lambda model: fed(model, tokens_of(9), prompt=1),
    "an argument that nobody knows": lambda model: fed(model, tokens_of(), something=1),
    "another backend": fed_on_the_reference,
}


@pytest.mark.parametrize("other", OTHER_STEPS)
def test_other_steps_are_left_to_the_block(other):
    model = model_on_path(num_hidden_layers=1)
    given, own, taken = compared(lambda: OTHER_STEPS[other](model))
    assert torch.equal(given, own)
    assert taken == 0


def test_what_is_returned_beside_the_logits():
    model, cache = model_on_path(attn_implementation="eager"), DynamicCache()
    fed(model, tokens_of(), cache)
    asked = {"output_attentions": True, "output_hidden_states": True}
    given, own, _ = gone_on(cache, lambda cache: model(tokens_of(2, 1), **asked, **{CACHE: cache}))
    assert (len(given.attentions), len(given.hidden_states)) == (2, 3)
    for pair in zip(given.attentions + given.hidden_states, own.attentions + own.hidden_states, strict=True):
        assert_alike(*pair)


def test_it_is_not_in_the_way_of_torch_compile():
    model, tokens = model_on_path(num_hidden_layers=1), tokens_of(1, 7)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    assert_alike(fed(compiled, tokens), fed(model, tokens))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def typed_in_place(model):
    for parameter in part_of(model).parameters():
        parameter.data = parameter.data.view(torch.bfloat16)[: len(parameter)].copy_(parameter.data.clone())
    return model


OTHER_MODELS = {
    "a copy": copy.deepcopy,
    "one from a file": saved_and_loaded,
    "in shared memory": lambda model: model.share_memory(),
    "in another type": lambda model: model.to(torch.bfloat16),
    "with other types at the same addresses": typed_in_place,
    "in another type and back": lambda model: model.half().float(),
}


@pytest.mark.parametrize("other", OTHER_MODELS)
def test_other_models_are_on_the_path(other):
    model = model_on_path(num_hidden_layers=1)
    fed(model, tokens_of())
    model = OTHER_MODELS[other](model)
    given, own, taken = compared(lambda: fed(model, tokens_of()))
    assert_alike(given, own)
    assert taken == TOKENS


def test_a_copy_has_numbers_of_its_own():
    model = model_on_path(num_hidden_layers=1)
    expected, copied = fed(model, tokens_of()), copy.deepcopy(model)
    part_of(copied, "input_layernorm").weight.data.mul_(2)
    given, own, _ = compared(lambda: fed(copied, tokens_of()))
    assert_alike(given, own)
    assert error_of(given, expected) > 0.01
    assert torch.equal(fed(model, tokens_of()), expected)


def give_new_state(layer, norm):
    layer.load_state_dict(layer.state_dict() | {"bias": 1 - layer.bias}, assign=True)
    norm.load_state_dict({"weight": 2 * norm.weight.data}, assign=True)


NEW_NUMBERS = {
    "a norm in place": lambda layer, norm: norm.weight.data.mul_(2),
    "a norm's data": lambda layer, norm: setattr(norm.weight, "data", 2 * norm.weight.data),
    "a norm's parameter": lambda layer, norm: setattr(norm, "weight", nn.Parameter(2 * norm.weight)),
    "a norm's type": lambda layer, norm: norm.to(torch.bfloat16),
    "scales in place": lambda layer, norm: layer.scales.mul_(2),
    "scales": lambda layer, norm: setattr(layer, "scales", 2 * layer.scales),
    "a bias": lambda layer, norm: setattr(layer, "bias", nn.Parameter(layer.bias + 1)),
    "no bias": lambda layer, norm: setattr(layer, "bias", None),
    "a state": give_new_state,
}


@pytest.mark.parametrize("new", NEW_NUMBERS)
def test_new_numbers_are_seen(new):
    model, cache = model_on_path(num_hidden_layers=1), DynamicCache()
    fed(model, tokens_of(), cache)
    NEW_NUMBERS[new](part_of(model, "self_attn.k_proj"), part_of(model, "input_layernorm"))
    given, own, _ = gone_on(cache, lambda cache: fed(model, tokens_of(2, 3), cache, prompt=0))
    assert_alike(given, own)


@pytest.mark.parametrize("name", ["input_layernorm.weight", "self_attn.v_proj.scales", "self_attn.v_proj.bias"])
def test_tensors_that_are_swapped_for_one_call(name):
    model, cache = model_on_path(num_hidden_layers=1), DynamicCache()
    before = fed(model, tokens_of(), cache)
    state = {f"model.layers.0.{name}": 2 * model.model.layers[0].state_dict()[name]}

    def run(cache):
        return torch.func.functional_call(model, state, (tokens_of(2, 1),), {CACHE: cache}).logits

    given, own, _ = gone_on(cache, run)
    assert_alike(given, own)
    assert torch.equal(fed(model, tokens_of()), before)
