"""Where a result goes: nothing of the user's is lost, and the folder may be called anything."""

from pathlib import Path
from unittest import mock

import pytest

from slablm import SlabError, compress
from slablm.api import compress_folder
from slablm.checkpoint import save
from slablm.compression.options import RunOptions
from slablm.dense import loading
from tests.compression.folders import Stop, assert_same_folders, stop_after, unfinished
from tests.conftest import byte_tokenizer


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "generation_config.json", "config.json"])
def test_files_of_the_user_are_not_lost(name, tiny_folder, quick, tmp_path):
    out, heard = tmp_path / "out", []
    out.mkdir()
    (out / name).write_text("mine")
    (out / "notes.txt").write_text("mine too")
    with pytest.raises(SlabError, match=f"already holds .*{name}.* would be replaced: .* give --overwrite"):
        compress_folder(str(tiny_folder), out, quick, RunOptions(), say=heard.append)
    assert heard == []  # nothing was read yet
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: "mine", "notes.txt": "mine too"}
    assert unfinished(tmp_path) == []
    compress_folder(str(tiny_folder), out, quick, RunOptions(overwrite=True))
    assert (out / "notes.txt").read_text() == "mine too"
    assert (out / name).read_text() != "mine"


def test_a_file_that_nobody_foresaw_is_found_before_publishing(tiny_folder, quick, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "words.bin").write_text("mine")
    original = type(byte_tokenizer()).save_pretrained

    def with_words(tokenizer, folder, *args, **kwargs):
        original(tokenizer, folder, *args, **kwargs)
        (Path(folder) / "words.bin").write_text("the tokenizer's")
        (Path(folder) / "more").mkdir()
        (Path(folder) / "more" / "words.txt").write_text("the tokenizer's")

    monkeypatch.setattr(type(byte_tokenizer()), "save_pretrained", with_words)
    with pytest.raises(SlabError, match=r"already holds words\.bin, which .*; 2 finished blocks are kept"):
        compress_folder(str(tiny_folder), out, quick, RunOptions())
    assert {path.name: path.read_text() for path in out.iterdir()} == {"words.bin": "mine"}
    compress_folder(str(tiny_folder), out, quick, RunOptions(resume=True, overwrite=True))
    assert (out / "words.bin").read_text() == (out / "more" / "words.txt").read_text() == "the tokenizer's"


def test_the_folder_that_one_is_in(tiny_folder, quick, tmp_path, monkeypatch):
    """`.` has no name of its own; the hidden folder is beside it all the same."""
    compress_folder(str(tiny_folder), tmp_path / "straight", quick, RunOptions())
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(Stop):
        compress_folder(str(tiny_folder), Path(), quick, RunOptions(), stop_after(9))
    assert unfinished(tmp_path) == [".here.unfinished"]
    assert list(here.iterdir()) == []
    compress_folder(str(tiny_folder), Path(), quick, RunOptions(resume=True))
    assert_same_folders(here, tmp_path / "straight")
    assert unfinished(tmp_path) == []


def test_saving_from_memory_loses_nothing_either(tiny_folder, quick, tmp_path):
    model, tokenizer = loading.load(str(tiny_folder))
    compress(model, quick, tokenizer=tokenizer)
    for name in ("README.md", "guide.md"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("mine")
        original = tokenizer.save_pretrained

        def with_guide(folder, original=original):
            original(folder)
            (Path(folder) / "guide.md").write_text("the tokenizer's")

        with mock.patch.object(tokenizer, "save_pretrained", with_guide), pytest.raises(SlabError, match=name):
            save.save(model, tokenizer, out, card="the model's")
        assert {path.name: path.read_text() for path in out.iterdir()} == {name: "mine"}
