"""One checkpoint, several models: without a head, with a language head, with a classifier's."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from slablm import SlabLinear
from slablm.checkpoint.inspection import inspect_folder

TOKENS = torch.arange(9)[None]


@torch.no_grad()
def states(model):
    return model(TOKENS).last_hidden_state


def packed(model):
    return sum(isinstance(module, SlabLinear) for module in model.modules())


def test_without_a_head(compressed_folder):
    whole = AutoModelForCausalLM.from_pretrained(compressed_folder)
    bare = AutoModel.from_pretrained(compressed_folder)
    assert packed(bare) == 14
    assert torch.equal(states(bare), states(whole.model))


def test_a_model_without_a_head_is_saved_and_loaded_under_its_own_names(compressed_folder, tmp_path):
    bare = AutoModel.from_pretrained(compressed_folder)
    bare.save_pretrained(tmp_path / "bare")
    assert inspect_folder(tmp_path / "bare").layers[0].name.startswith("layers.0.")
    again = AutoModel.from_pretrained(tmp_path / "bare")
    assert torch.equal(states(again), states(bare))
    headed = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    assert packed(headed) == 14
    assert torch.equal(states(headed.model), states(bare))


def test_with_a_classifier(compressed_folder):
    whole = AutoModelForCausalLM.from_pretrained(compressed_folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(compressed_folder, num_labels=3, pad_token_id=1)
    assert packed(classifier) == 14
    assert torch.equal(states(classifier.model), states(whole.model))
    assert classifier(TOKENS).logits.shape == (1, 3)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_offloading(auto, compressed_folder, tmp_path):
    """The places of a device map are the model's own names as well."""
    whole = auto.from_pretrained(compressed_folder, pad_token_id=1)
    everything = auto.from_pretrained(compressed_folder, pad_token_id=1, device_map={"": "cpu"})
    assert packed(whole) == packed(everything) == 14
