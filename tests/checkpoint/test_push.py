"""Uploading: the hub gets the files that lie in the folder, guard and digests included. The hub is a stand-in."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import EntryNotFoundError

import slablm
from slablm.checkpoint.inspection import inspect_folder


class Hub:
    """What transformers asks of `huggingface_hub.HfApi`, kept in memory."""

    def __init__(self):
        self.created, self.commits, self.files = [], [], {}

    def create_repo(self, repo_id, **options):
        self.created.append((repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id.rpartition('/')[2]}")

    def create_commit(self, repo_id, operations, **options):
        self.commits.append((repo_id, options))
        self.files |= {item.path_in_repo: Path(item.path_or_fileobj).read_bytes() for item in operations}

    def create_branch(self, **options):
        pass


@pytest.fixture
def hub(monkeypatch):
    from transformers.utils import hub as transformers_hub

    stand_in = Hub()

    def no_card(*args, **kwargs):
        raise EntryNotFoundError("there is none")

    monkeypatch.setattr(transformers_hub, "hf_api", lambda: stand_in)
    monkeypatch.setattr(transformers_hub.ModelCard, "load", no_card)
    return stand_in


@pytest.fixture
def compressed(tiny_model, tokenizer, quick):
    return slablm.compress(tiny_model, quick, tokenizer=tokenizer)


def holds_a_model(files, folder):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    inspect_folder(folder)
    assert b"transformers_weights" in files["config.json"]


def test_saving_uploads_the_finished_files(compressed, hub, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("nobody else's")
    compressed.save_pretrained(out, push_to_hub=True, private=True, token="t", commit_message="first", create_pr=True)
    assert hub.created == [("mine", {"exist_ok": True, "private": True, "token": "t"})]
    assert hub.commits[0][0] == "me/mine"
    assert hub.commits[0][1]["commit_message"] == "first"
    assert hub.commits[0][1]["create_pr"] is True
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir() if path.name != "notes.txt"}
    assert {"README.md", "model.safetensors"} <= hub.files.keys()
    holds_a_model(hub.files, tmp_path / "downloaded")


def test_shards_a_name_and_a_card_of_ones_own(compressed, hub, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("# mine")
    compressed.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="org/name", max_shard_size="100KB")
    assert hub.created[0][0] == "org/name"
    assert hub.files["README.md"] == b"# mine"
    assert "model.safetensors.index.json" in hub.files
    holds_a_model(hub.files, tmp_path / "downloaded")


def test_who_may_not_write_there_has_saved_nothing(compressed, hub, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("403 Forbidden")

    monkeypatch.setattr(hub, "create_repo", refuse, raising=False)
    with pytest.raises(OSError, match="403"):
        compressed.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()


def test_the_method_push_to_hub(compressed, hub, tmp_path):
    compressed.push_to_hub("name")
    assert {"README.md", "config.json", "model.safetensors"} <= hub.files.keys()
    holds_a_model(hub.files, tmp_path / "downloaded")
