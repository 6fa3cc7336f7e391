"""Uploading to the hub, against a stand-in for its HTTP API."""

import json
import os
import shutil
import sys

import pytest

from slablm import SlabError
from slablm.checkpoint.inspection import inspect_folder
from slablm.serving import hub as uploading
from tests.cli.test_cli import refused, slablm
from tests.serving.hub_server import Hub, serving

CONFIG = {"quantization_config": {"quant_method": "slab"}}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that this process takes for the hub, and a token that it accepts."""
    from huggingface_hub import constants

    stand_in = Hub()
    with serving(stand_in) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "good")
        yield stand_in


@pytest.fixture
def folder(compressed_folder, tmp_path):
    """A checkpoint with what a folder may hold besides."""
    out = tmp_path / "out"
    shutil.copytree(compressed_folder, out)
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    (out / ".cache").mkdir()
    (out / ".cache" / "notes").write_text("of this machine only")
    return out


def test_push(hub, folder, tmp_path):
    done = slablm("push", folder, "me/small", "--private")
    assert (done.returncode, done.stdout.rpartition("/me/")[2]) == (0, "small\n"), done.stderr
    repository = hub.repositories["me/small"]
    assert repository["private"] is True
    visible = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    assert repository["files"] == {str(path.relative_to(folder)): path.read_bytes() for path in visible}
    card = repository["files"]["README.md"].decode()
    assert 'from_pretrained("me/small")' in card
    assert "path/to" not in card
    for path, content in repository["files"].items():
        (tmp_path / "downloaded" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "downloaded" / path).write_bytes(content)
    inspect_folder(tmp_path / "downloaded")


def test_push_again_replaces_the_weights_of_before(hub, folder):
    """A model in fewer files must not lie beside shards of the old one; what the owner has added stays."""
    old = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b"{}", "notes.md": b"mine"}
    hub.add("me/small", private=True, files={"config.json": json.dumps(CONFIG).encode(), **old})
    address = uploading.push(folder, "me/small")
    assert address.endswith("/me/small")
    assert hub.repositories["me/small"]["private"] is True
    files = hub.repositories["me/small"]["files"]
    assert files["config.json"] == (folder / "config.json").read_bytes()
    assert {name for name in files if "model" in name} == {"model.safetensors"}
    assert files["notes.md"] == b"mine"


def test_an_organisation(hub, folder):
    uploading.push(folder, "ours/small")
    assert hub.repositories["ours/small"]["private"] is False


def test_after_a_failure_the_same_command_goes_on(hub, folder):
    hub.failures.append(("POST", "/commit/", 400))
    with pytest.raises(SlabError, match=r"^me/small: the hub failed \(.*\): run the same command again later$"):
        uploading.push(folder, "me/small", private=True)
    uploading.push(folder, "me/small", private=True)
    assert "model.safetensors" in hub.repositories["me/small"]["files"]


def role(hub):
    hub.role = "read"


def locked(hub):
    hub.add("me/small")
    hub.may_write = False


def dense(hub):
    hub.add("me/small", files={"model.safetensors": b"", "config.json": b"{}"})


REFUSED = {
    "no token": ({"HF_TOKEN": ""}, None, "me/small", "no token for the Hugging Face hub: log in with `hf auth login`"),
    "bad token": (
        {"HF_TOKEN": "bad"},
        None,
        "me/small",
        "does not accept the token: log in again with `hf auth login`",
    ),
    "may only read": ({}, role, "me/small", "the token for the hub may only read: .*`hf auth login`"),
    "may not write there": ({}, locked, "me/small", "the token may not write there"),
    "somebody else's": ({}, None, "you/small", r"'you' is none of your names on the hub \(me, ours\)"),
    "no owner": ({}, None, "small", "'small' is no name on the hub: give USER/NAME"),
    "a path": ({}, None, "me/a/b", "no name on the hub"),
    "bad letters": ({}, None, "me/sm all", "'me/sm all' is no name on the hub"),
    "public": ({}, lambda hub: hub.add("me/small"), "me/small", "me/small is public already: make it private"),
    "another model": ({}, dense, "me/small", "holds a model that slablm has not written: take another name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_come_before_the_work(case, hub, tiny_folder, tmp_path, monkeypatch):
    """Before hours of compression, and before anything changes on the hub."""
    environment, prepare, name, message = REFUSED[case]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    if prepare:
        prepare(hub)
    done = slablm("compress", tiny_folder, tmp_path / "out", "--push-to-hub", name, "--private")
    refused(done, message)
    assert "Reading" not in done.stderr
    assert {method for method, _ in hub.asked} <= {"GET", "HEAD"}


def test_without_a_network(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(
        slablm("push", folder, "me/small"), "me/small: the hub cannot be reached: check the network and HF_HUB_OFFLINE"
    )


def test_what_is_no_checkpoint_stays_here(hub, folder, tiny_folder):
    refused(slablm("push", tiny_folder, "me/small"), "is not a slablm checkpoint")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    refused(slablm("push", folder, "me/small"), "is corrupted")
    assert hub.asked == []


def test_compress_and_push(hub, tiny_folder, text_file, tmp_path):
    options = ["--calibration", text_file, "--num-samples", 2, "--seq-len", 16, "--method", "wanda"]
    command = ["compress", tiny_folder, tmp_path / "out", *options, "--resume", "--push-to-hub", "me/small"]
    hub.failures.append(("POST", "/commit/", 400))
    refused(slablm(*command, "--private"), "the hub failed")
    done = slablm(*command, "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert "nothing to go on with" in done.stderr
    assert json.loads(done.stdout)["url"].endswith("/me/small")
    assert hub.repositories["me/small"]["private"] is True
    assert hub.repositories["me/small"]["files"]["config.json"] == (tmp_path / "out" / "config.json").read_bytes()
    refused(slablm(*command[:-2], "--private"), "--private is for --push-to-hub")


def test_from_the_hub_to_the_hub_on_a_terminal(tiny_folder, text_file, tmp_path):
    """The hub shows how far its download is, then we how far compression is, then the hub its upload."""
    pexpect = pytest.importorskip("pexpect")
    hub = Hub()
    hub.add("me/tiny", files={path.name: path.read_bytes() for path in tiny_folder.iterdir()})
    options = ["--calibration", str(text_file), "--num-samples", "2", "--seq-len", "16", "--method", "wanda"]
    command = ["-m", "slablm", "compress", "me/tiny", str(tmp_path / "out"), *options, "--push-to-hub", "ours/small"]
    with serving(hub) as address:
        here = {"HF_ENDPOINT": address, "HF_TOKEN": "good", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        child = pexpect.spawn(sys.executable, command, env=os.environ | here, encoding="utf-8", dimensions=(30, 200))
        child.expect("model.safetensors: +100%", timeout=120)
        child.expect(r"Compressing \(wanda\) .*14/14", timeout=120)
        child.expect("Uploading .* to ours/small: [0-9]+ files", timeout=120)
        child.expect("next: slablm inspect", timeout=120)
        child.expect(pexpect.EOF, timeout=120)
    card = hub.repositories["ours/small"]["files"]["README.md"].decode()
    assert "base_model: me/tiny\n" in card
    assert "base_model_relation: quantized" in card
