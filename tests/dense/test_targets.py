import pytest
from torch import nn

from slablm import CompressionConfig, SlabError
from slablm.dense.targets import Targets, find_blocks, matches, select_targets
from tests.compression.mixtures import tiny


def test_all_linears_of_the_blocks_and_nothing_else(tiny_model):
    targets = select_targets(tiny_model, CompressionConfig())
    assert [len(names) for names in targets.names] == [7, 7]
    assert "model.layers.1.mlp.down_proj" in targets.names[1]
    assert targets.left_dense == {}


def test_suffixes_names_and_patterns():
    name = "model.layers.0.mlp.up_proj"
    assert matches(name, "up_proj")
    assert matches(name, "mlp.up_proj")
    assert matches(name, name)
    assert matches(name, r"re:.*layers\.\d+\.mlp\..*")
    assert not matches(name, "p_proj")
    assert not matches(name, "re:mlp")


def test_what_is_left_dense_is_reported_with_the_reason(tiny_model):
    config = CompressionConfig(targets=("q_proj", "mlp.up_proj"), ignore=("model.layers.0.mlp.up_proj",))
    targets = select_targets(tiny_model, config)
    assert targets.names == (
        ("model.layers.0.self_attn.q_proj",),
        ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"),
    )
    assert targets.left_dense["model.layers.0.mlp.up_proj"] == "ignored by 'model.layers.0.mlp.up_proj'"
    assert targets.left_dense["model.layers.1.mlp.down_proj"] == "not a target"
    assert sum(map(len, targets.names)) + len(targets.left_dense) == 14


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("qproj",)}, "pattern 'qproj' matches no linear layer.*called like 'model.layers.0"),
        ({"ignore": ("lm_head",)}, "pattern 'lm_head' matches no linear layer"),
        ({"targets": ("re:(",)}, "no valid regular expression"),
        ({"ignore": ("all-linear",)}, "nothing to compress"),
    ],
)
def test_patterns_that_match_nothing(tiny_model, settings, message):
    with pytest.raises(SlabError, match=message):
        select_targets(tiny_model, CompressionConfig(**settings))


def test_a_model_without_blocks():
    with pytest.raises(SlabError, match="no decoder blocks found in Linear"):
        find_blocks(nn.Linear(2, 2))


def test_what_gates_experts_stays_dense_and_may_be_ignored():
    model = tiny("qwen2_moe")
    targets = select_targets(model, CompressionConfig(ignore=("shared_expert_gate",)))
    gates = {name for name in targets.left_dense if name.endswith("shared_expert_gate")}
    assert {targets.left_dense[name] for name in gates} == {"it gates experts"}
    assert len(gates) == 2
    names = [name.rpartition("layers.0.mlp.")[2] for name in targets.names[0] if ".mlp." in name]
    projections = ("gate_proj", "up_proj", "down_proj")
    shared = [f"shared_expert.{name}" for name in projections]
    assert sorted(names) == sorted([f"experts.{number}.{name}" for number in range(4) for name in projections] + shared)


@pytest.mark.parametrize(("share", "refused"), [(0.49, True), (0.51, False)])
def test_half_of_the_weights_have_to_be_within_reach(share, refused):
    targets = Targets(((),), {}, {"a": round(1000 * (1 - share)) - 1, "b": 1}, 1000)
    if refused:
        with pytest.raises(SlabError, match=r"only 49.0 % of the blocks' weights can be compressed \(a\)"):
            targets.check_reach()
    else:
        targets.check_reach()
