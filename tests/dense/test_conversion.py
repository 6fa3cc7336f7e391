"""A model's tensors under its own names, wherever they lie in files: experts one by one, transposed, renamed."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from slablm import SlabError
from slablm.checkpoint.shards import TensorFile
from slablm.compression.fingerprint import model_digest
from slablm.dense.conversion import by_own_names
from slablm.dense.opening import open_dense, why_whole
from slablm.runtime.experts import separate_experts
from tests.compression.mixtures import FAMILIES, build, tiny

FILE = "model.safetensors"


def edit(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("original", [True, False], ids=["as on the hub", "as in transformers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_found_and_right(family, original, tmp_path):
    model = tiny(family)
    opened = open_dense(str(build(tmp_path, family, save_original_format=original)))
    assert opened.whole_because == ""
    separate_experts(model)
    state = model.state_dict()
    assert state.keys() == opened.weights.keys()
    for name, piece in opened.weights.items():
        assert torch.equal(piece.read(), state[name]), name
        assert piece.shape == tuple(state[name].shape)
        assert b"".join(piece.chunks()) == state[name].contiguous().numpy().tobytes()


def test_hubs_and_transformers_layouts_are_both_there(tmp_path):
    """The test above would test one of them twice otherwise."""
    hub, own = (load_file(build(tmp_path / str(o), "mixtral", save_original_format=o) / FILE) for o in (True, False))
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in hub
    assert own["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 128, 64)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_it_is_the_same_model_in_either_layout(family, tmp_path):
    folders = [build(tmp_path / str(o), family, save_original_format=o) for o in (True, False)]
    assert len({model_digest(open_dense(str(folder))) for folder in folders}) == 1


def test_a_tensor_of_all_experts_of_another_shape(tmp_path):
    folder, name = build(tmp_path, "gpt_oss"), "model.layers.1.mlp.experts.gate_up_proj"
    edit(folder, lambda tensors: tensors.update({name: tensors[name][:3].clone()}))
    with pytest.raises(
        SlabError, match=rf"tensor '{name}' has shape \[3, 64, 128\], the config asks for \[4, 64, 128\]"
    ):
        open_dense(str(folder))


def test_an_expert_that_is_missing(tmp_path):
    folder = build(tmp_path, "qwen3_moe")
    edit(folder, lambda tensors: tensors.pop("model.layers.0.mlp.experts.2.down_proj.weight"))
    with pytest.raises(SlabError, match=r"tensor 'model.layers.0.mlp.experts.2.down_proj.weight' is missing"):
        open_dense(str(folder))


def test_a_new_name_that_the_model_has_not_is_not_taken(tmp_path, monkeypatch):
    """As transformers loads it."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    folder = build(tmp_path, "mixtral", save_original_format=False)
    renamed = [WeightRenaming("q_proj", "query"), WeightRenaming("k_proj", "v_proj")]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: renamed)
    model = tiny("mixtral")
    separate_experts(model)
    missing = model.state_dict().keys() - by_own_names(model, TensorFile.open(folder / FILE).pieces).keys()
    assert missing == {f"model.layers.{block}.self_attn.k_proj.weight" for block in range(2)}


@pytest.mark.parametrize("name", ["mlp.experts.down_proj", "self_attn.o_proj.weight"])
def test_what_is_turned_on_the_way_is_not_followed(name, tmp_path, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    folder = build(tmp_path, "mixtral", save_original_format=False)
    model = tiny("mixtral")
    separate_experts(model)
    turned = [WeightConverter(name, name, [Transpose(0, 1)])]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: turned)
    found = by_own_names(model, TensorFile.open(folder / FILE).pieces)
    projection = name.removesuffix(".weight").rpartition(".")[2]
    assert model.state_dict().keys() - found.keys() == {key for key in model.state_dict() if projection in key}
    assert why_whole(model, found) == "transformers changes the names of its tensors"
