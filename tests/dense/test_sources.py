"""Where the weights of a model on the hub are, and what is said if the hub does not give them."""

import importlib
import shutil

import pytest
import transformers.utils.hub
from huggingface_hub import errors

from slablm import SlabError
from slablm.dense import loading, sources
from tests.cli.test_cli import refused, slablm

# By the version of huggingface_hub that is httpx or httpx2.
httpx = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])
ANSWER = httpx.Response(403, request=httpx.Request("HEAD", "https://huggingface.co"))
OFFLINE = "the hub cannot be reached, .* with `hf download owner/tiny`; .* with --calibration builtin"
TROUBLE = {
    "gated": (
        errors.GatedRepoError("403\n\nAccess is restricted.", response=ANSWER),
        r"licence .* accepted first: do so at https://huggingface\.co/owner/tiny, then log in with `hf auth login`",
    ),
    "unknown": (
        errors.RepositoryNotFoundError("404", response=ANSWER),
        "no such model, or not for you: check the name, or log in with `hf auth login`",
    ),
    "revision": (errors.RevisionNotFoundError("404", response=ANSWER), "no such revision of it: check --revision"),
    "not cached": (errors.LocalEntryNotFoundError("not in the cache"), OFFLINE),
    "offline": (errors.OfflineModeIsEnabled("offline"), OFFLINE),
    "no network": (httpx.ConnectError("no route"), OFFLINE),
    "broken": (errors.HfHubHTTPError("503\nbusy", response=ANSWER), "the hub failed: 503 busy"),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Let the hub fail for all files but those in its cache: (folder of the cached model, function)."""
    commit = "0123456789" * 4
    cached = tmp_path / "hub" / "models--owner--tiny"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def fail(error):
        def download(*args, **kwargs):
            raise error

        monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", download)

    return cached / "snapshots" / commit, fail


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_hub_that_does_not_answer(trouble, hub):
    error, message = TROUBLE[trouble]
    hub[1](error)
    with pytest.raises(SlabError, match=f"^model 'owner/tiny' cannot be loaded: .*{message}$"):
        sources.model_files("owner/tiny", None)
    if trouble != "no network":  # huggingface_hub itself says "not cached" then; transformers forgets the cause
        with pytest.raises(SlabError, match=f"^model 'owner/tiny' cannot be loaded: .*{message}$"):
            loading.load("owner/tiny")


def test_the_command_line_says_it_in_one_line(hub, text_file, tmp_path):
    hub[1](TROUBLE["gated"][0])
    refused(slablm("compress", "owner/tiny", tmp_path / "out", "--calibration", text_file), TROUBLE["gated"][1])


def test_a_repository_without_safetensors(hub):
    hub[1](errors.RemoteEntryNotFoundError("404", response=ANSWER))
    assert sources.model_files("owner/tiny", None) == []


@pytest.mark.parametrize("trouble", ["not cached", "gated"])
def test_what_is_in_the_cache_is_enough(trouble, hub):
    folder, fail = hub
    fail(TROUBLE[trouble][0])
    (folder / "config.json").write_text("{}")
    with pytest.raises(SlabError, match=TROUBLE[trouble][1]):
        sources.model_files("owner/tiny", None)  # as after `slablm plan`
    (folder / "model.safetensors").write_bytes(b"")
    assert sources.model_files("owner/tiny", None) == [folder / "model.safetensors"]


def test_plan_downloads_no_weights(hub, tiny_folder, text_file):
    """They are unreachable for it by intention: the config is enough."""
    folder, fail = hub
    fail(TROUBLE["not cached"][0])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, folder)
    options = ["--calibration", text_file, "--num-samples", 4, "--seq-len", 32, "--iterations", 4]
    done = slablm("plan", "owner/tiny", *options)
    assert done.returncode == 0, done.stderr
    assert "no weights here: shapes come from config.json alone" in done.stdout


def test_a_shard_that_was_not_downloaded(hub):
    folder, fail = hub
    fail(TROUBLE["not cached"][0])
    (folder / "config.json").write_text("{}")
    (folder / "a.safetensors").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text(
        '{"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
    )
    with pytest.raises(SlabError, match=OFFLINE):
        sources.model_files("owner/tiny", None)
