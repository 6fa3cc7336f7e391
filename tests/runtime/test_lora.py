"""Adapters of PEFT are trained beside compressed layers, which stay as they are."""

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM

from slablm import SlabError, SlabLinear

peft = pytest.importorskip("peft")
from slablm.runtime.lora import SlabLora  # noqa: E402

# PEFT asks a deprecated attribute of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = ["q_proj", "up_proj"]
TOKENS = torch.arange(48).view(2, 24)


def config_of(**settings):
    return peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **settings)


@pytest.fixture
def model(compressed_folder):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(compressed_folder)


def loss_of(model):
    return model(TOKENS, labels=TOKENS).loss


def train(model, steps):
    """The loss before each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("native", [True, False])
def test_an_adapter_learns_and_the_weights_stay(model, native):
    layers = [layer for layer in model.modules() if isinstance(layer, SlabLinear)]
    for layer in layers:
        if not native and layer.native is not None:
            layer.use_packed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense_loss = loss_of(model).item()
    model = peft.get_peft_model(model, config_of(lora_dropout=0.1))
    assert sum(isinstance(layer, SlabLora) for layer in model.modules()) == 2 * 2
    model.eval()
    assert loss_of(model).item() == pytest.approx(dense_loss)  # B starts at 0
    model.train()
    train(model, 5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and p.grad.abs().sum() > 0 for name, p in trained.items())
    assert all(p.dtype == torch.float32 for p in trained.values())
    model.eval()
    assert loss_of(model) < dense_loss - 0.05
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_an_adapter_attaches_trains_20_steps_with_falling_loss_saves_and_reloads(model, compressed_folder, tmp_path):
    model = peft.get_peft_model(model, config_of())
    losses = train(model, 20)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.2
    model.eval().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(compressed_folder), tmp_path).eval()
    torch.testing.assert_close(loss_of(again), loss_of(model))
    with again.disable_adapter():
        assert loss_of(again) > loss_of(model)


def test_what_needs_a_dense_weight_is_refused(model):
    with pytest.raises(SlabError, match="cannot be merged into a compressed weight"):
        peft.get_peft_model(model, config_of()).merge_and_unload()


def add_adapter(model, config):
    """transformers' own way, which asks for a version of PEFT."""
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers wants PEFT {MIN_PEFT_VERSION} or later")
    model.add_adapter(config)
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"init_lora_weights": "pissa"}, "'pissa' reads a dense weight"), ({"use_dora": True}, "unsupported variant")],
)
def test_variants_that_need_a_dense_weight_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, config_of(**settings))


@pytest.mark.parametrize("attach", [peft.get_peft_model, add_adapter])
def test_trainers_accept_a_compressed_model(attach, model):
    from transformers import trainer_utils

    if not hasattr(trainer_utils, "validate_quantization_for_training"):
        pytest.skip("this transformers has the check inside of its Trainer")
    trainer_utils.validate_quantization_for_training(attach(model, config_of()))


def test_an_adapter_of_transformers_own(model):
    inputs = torch.arange(3, 20)[None]
    before = model(inputs).logits
    model = add_adapter(model, config_of())
    assert torch.equal(model(inputs).logits, before)  # B is zero at first
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
