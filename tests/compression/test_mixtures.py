"""Mixtures of experts from end to end: each expert's matrices are targets like any other."""

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

import slablm
from slablm import CompressionConfig, SlabError
from slablm.api import compress_folder, compress_model
from slablm.checkpoint.inspection import inspect_folder
from slablm.checkpoint.layer_report import FEW_TOKENS
from slablm.compression.options import RunOptions
from slablm.dense import loading
from slablm.dense.targets import select_targets
from slablm.planning import plan as planning
from slablm.runtime import experts as runtime
from slablm.runtime.experts import all_experts
from slablm.runtime.linear import SlabLinear
from tests.compression.folders import NOTE, Stop, assert_same_folders, in_memory, stop_after
from tests.compression.mixtures import FAMILIES, build, tiny

TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
# In such tiny runs there are few for all.
pytestmark = pytest.mark.filterwarnings("ignore:fewer than .* calibration tokens")


@pytest.fixture
def brief(text_file):
    return CompressionConfig("slab", calibration=str(text_file), num_samples=2, seq_len=24, iterations=2)


def fill(model, compressed):
    """Give transformers' own experts, and all other layers, the weights of a compressed model."""
    for name, layer in compressed.named_modules():
        if not isinstance(layer, SlabLinear):
            continue
        weight = layer.packed.dense()
        owner, _, projection = name.rpartition(".")
        mixture, _, number = owner.rpartition(".")
        if not number.isdigit() or not mixture.endswith("experts"):
            model.get_submodule(name).weight.data = weight
            continue
        fused = model.get_submodule(mixture)
        share = runtime.shares_of(fused)[projection]
        share.of(getattr(fused, share.tensor).data[int(number)]).copy_(weight)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_streamed_as_in_memory_as_planned_and_as_transformers_computes(family, brief, tmp_path):
    source = build(tmp_path / "dense", family)
    planned = planning.plan(str(source), brief, measure_speed=False)
    assert not planned.problems
    assert planned.whole_because == ""
    weights = sum(p.numel() for n, p in tiny(family).named_parameters() if ".layers." in n)
    assert planned.outlook.size.weights >= 0.95 * weights

    said = []
    compress_folder(str(source), tmp_path / "out", brief, say=said.append)
    assert not any("whole model is in memory" in line for line in said)
    inspection = inspect_folder(tmp_path / "out")
    assert inspection.file_bytes == planned.outlook.size.file_bytes
    assert inspection.model_bits_per_weight == planned.outlook.size.model_bits_per_weight
    assert {layer.name for layer in inspection.layers} == {r.name for r in planned.outlook.size.layers}
    in_memory(source, tmp_path / "memory", brief)
    assert_same_folders(tmp_path / "out", tmp_path / "memory", besides=NOTE)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logits = model(TOKENS).logits
    like = AutoModelForCausalLM.from_pretrained(source)
    for parameter in like.parameters():  # as what stays dense is stored
        parameter.data = parameter.data.half().float() if parameter.ndim > 1 else parameter.data
    torch.testing.assert_close(fill(like, model)(TOKENS).logits, logits, rtol=1e-3, atol=1e-3)
    # A token at a time goes to few experts.
    written = model.generate(
        TOKENS[:1],
        min_new_tokens=4,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    at_once = model(written.sequences).logits[0, -5:-1]
    torch.testing.assert_close(torch.cat(written.logits), at_once, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_symbols_also_after_a_stop(text_file, tmp_path):
    source = build(tmp_path / "dense", "gpt_oss")
    names = ("experts.0.gate_proj", "experts.0.up_proj", "experts.3.down_proj")
    config = CompressionConfig(
        "slab+", bits_per_weight=5.0, calibration=str(text_file), num_samples=2, seq_len=24, targets=names
    )
    in_memory(source, tmp_path / "memory", config)
    with pytest.raises(Stop):
        compress_folder(str(source), tmp_path / "out", config, on_layer=stop_after(4))
    resumed = compress_folder(str(source), tmp_path / "out", config, RunOptions(resume=True))
    assert resumed.resumed_blocks == 1
    assert len(resumed.rarely_chosen) == 4  # those of the finished block included
    assert_same_folders(tmp_path / "out", tmp_path / "memory", besides=NOTE)
    assert all(layer.symbol_bits for layer in inspect_folder(tmp_path / "out").layers)


@pytest.mark.parametrize(("family", "dtype"), [("deepseek_v3", torch.bfloat16), ("gpt_oss", torch.float16)])
def test_parts_in_float32_are_streamed(family, dtype, brief, tmp_path):
    """Routers of the one, norms of the other."""
    source = build(tmp_path / "dense", family, dtype)
    said = []
    compress_folder(str(source), tmp_path / "out", brief, say=said.append)
    assert not any("whole model is in memory" in line for line in said)
    in_memory(source, tmp_path / "memory", brief)
    assert_same_folders(tmp_path / "out", tmp_path / "memory", besides=NOTE)


@pytest.mark.parametrize("method", ["sparsegpt", "gptq"])
def test_yardsticks_go_the_same_way(method):
    from slablm.compression.blocks import compress_blocks

    model = tiny("mixtral")
    config = CompressionConfig(method, num_samples=2, ratio=None if method == "gptq" else 0.5)
    targets = select_targets(model, config)
    before = {name: model.get_submodule(name).weight.clone() for block in targets.names for name in block}
    reports = compress_blocks(model, targets, TOKENS, config)
    assert {report.name for report in reports} == before.keys()
    assert sum(".experts." in name for name in before) == 2 * 4 * 3
    assert all(not torch.equal(model.get_submodule(name).weight, weight) for name, weight in before.items())


def test_experts_that_few_tokens_are_sent_to_are_named(brief, tmp_path):
    source = build(tmp_path / "dense", "mixtral")
    said, reports = [], []
    result = compress_folder(
        str(source), tmp_path / "out", brief, on_layer=lambda done, total, report: reports.append(report),
        say=said.append,
    )  # fmt: skip
    experts = [f"model.layers.{block}.mlp.experts.{number}" for block in range(2) for number in range(4)]
    assert list(result.rarely_chosen) == experts
    for block in range(2):  # each of 2 × 24 tokens went to two
        assert sum(result.rarely_chosen[name] for name in experts[4 * block : 4 * block + 4]) == 2 * 2 * 24
    first = ", ".join(f"{name} ({result.rarely_chosen[name]})" for name in experts[:3])
    assert said[-1] == (
        f"fewer than {FEW_TOKENS} calibration tokens were sent to {first} and 5 more: more --num-samples would help"
    )
    assert {r.routed for r in reports if ".experts." not in r.name} == {None}
    text = (tmp_path / "out" / "README.md").read_text()
    begin = f"fewer than {FEW_TOKENS} calibration tokens to: 8\n(`{experts[0]}` {result.rarely_chosen[experts[0]]}, "
    assert begin in text


def test_an_expert_with_enough_tokens_is_not_named(brief, monkeypatch):
    from slablm.checkpoint import layer_report

    monkeypatch.setattr(layer_report, "FEW_TOKENS", 1)
    model = tiny("mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reports = compress_model(model, select_targets(model, brief), TOKENS, brief)
    chosen = [report.routed for report in reports if report.name.endswith("up_proj")]
    assert min(chosen) >= 1


@torch.no_grad()
def test_what_goes_on_to_the_next_block_is_routed(brief, monkeypatch):
    """All tokens go through all experts for statistics alone."""
    from slablm.compression import blocks

    seen = {}

    def lossless(layers, stats, configs, note, world):
        seen.update({name: one.input_norms for name, one in stats.items()})
        return blocks.FinishedBlock(reports=[type("Report", (), {"name": name})() for name in layers])

    monkeypatch.setattr(blocks, "_compress_layers", lossless)
    model = tiny("mixtral")
    name = "model.layers.1.self_attn.q_proj"
    targets = select_targets(model, brief)
    inputs = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(TOKENS)
    expected = torch.cat(inputs).flatten(0, 1).norm(dim=0)
    blocks.compress_blocks(model, targets, TOKENS, brief)
    torch.testing.assert_close(seen[name], expected, rtol=1e-4, atol=1e-4)
    # One statistic for the inputs of all experts, chosen or not.
    gates = [seen[f"model.layers.1.mlp.experts.{number}.gate_proj"] for number in range(4)]
    assert all(torch.equal(gates[0], other) for other in gates)


@torch.no_grad()
def test_ignored_experts_stay_dense_and_come_back(brief, tmp_path):
    """transformers would join what is called like its own experts' tensors, in a model without a head."""
    from transformers import AutoModel

    source = build(tmp_path / "dense", "qwen3_moe")
    config = CompressionConfig(**brief.to_dict() | {"ignore": [r"re:.*layers\.0.*experts.*", "experts.2.up_proj"]})
    compress_folder(str(source), tmp_path / "out", config)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    headless, same = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] | same["missing_keys"] | info["unexpected_keys"]
    assert same["unexpected_keys"] == {"lm_head.weight"}
    assert torch.equal(headless(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)
    dense = loading.load(str(source))[0]
    runtime.separate_experts(dense)
    for name in ("model.layers.0.mlp.experts.3.gate_proj", "model.layers.1.mlp.experts.2.up_proj"):
        assert torch.equal(model.get_submodule(name).weight.float(), dense.get_submodule(name).weight.half().float())
    model.save_pretrained(tmp_path / "again")
    again, out = (tmp_path / name / "model.safetensors" for name in ("again", "out"))
    assert again.read_bytes() == out.read_bytes()


@torch.no_grad()
def test_a_model_without_a_head_has_the_experts_too(brief, tmp_path):
    from transformers import AutoModel

    compress_folder(str(build(tmp_path / "dense", "olmoe")), tmp_path / "out", brief)
    whole, headless = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoModel))
    expected = whole.model(TOKENS).last_hidden_state
    assert torch.equal(headless(TOKENS).last_hidden_state, expected)
    assert [name for name, _ in all_experts(headless)] == [f"layers.{block}.mlp.experts" for block in range(2)]


@torch.no_grad()
def test_other_types_and_copies(brief, tmp_path):
    import copy

    compress_folder(str(build(tmp_path / "dense", "gpt_oss")), tmp_path / "out", brief)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = model(TOKENS).logits
    assert torch.equal(copy.deepcopy(model)(TOKENS).logits, expected)
    narrow = model.to(torch.bfloat16)(TOKENS).logits
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - expected).norm() < 0.1 * expected.norm()
    model.save_pretrained(tmp_path / "again")
    stored = {layer.name: layer.true_bits for layer in inspect_folder(tmp_path / "out").layers}
    assert {layer.name: layer.true_bits for layer in inspect_folder(tmp_path / "again").layers} == stored


@pytest.fixture
def unknown(monkeypatch):
    """Experts of a form that nothing is known about."""
    monkeypatch.setattr(runtime, "shares_of", lambda module: {})


REFUSED = (
    r"only \d+\.\d % of the blocks' weights can be compressed \(MixtralExperts is not a plain nn.Linear\): "
    "give --mostly-dense to go on with these"
)


def test_a_model_that_would_stay_mostly_dense_is_refused(unknown, brief, tmp_path):
    source = build(tmp_path / "dense", "mixtral", torch.bfloat16)
    with pytest.raises(SlabError, match=REFUSED):
        compress_folder(str(source), tmp_path / "out", brief)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    planned = planning.plan(str(source), brief, measure_speed=False)
    assert len(planned.problems) == 1
    model, tokenizer = loading.load(str(source))
    with pytest.raises(SlabError, match=REFUSED):
        slablm.compress(model, brief, tokenizer=tokenizer)
    options = RunOptions(mostly_dense=True)
    assert not planning.plan(str(source), brief, options=options, measure_speed=False).problems
    compress_folder(str(source), tmp_path / "out", brief, options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 8
    assert "experts" not in config
    assert len(config["modules"]) == 8


def test_few_targets_by_choice_are_not_refused(brief, tmp_path):
    config = CompressionConfig(**brief.to_dict() | {"targets": ["q_proj"]})
    assert not planning.plan(str(build(tmp_path / "dense", "mixtral")), config, measure_speed=False).problems
