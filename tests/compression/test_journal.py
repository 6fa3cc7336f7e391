"""The journal keeps what is finished, and nothing else."""

import json
import os
from contextlib import suppress

import pytest
import torch

from slablm import SlabError
from slablm.checkpoint.staging import remove_abandoned
from slablm.compression.journal import block_key, open_journal, outside_key, unfinished_folder

PRINT = {"model": "m", "setting ratio": "0.5"}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "deep" / "out"


def tensors(seed):
    return {f"w{seed}": torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))}


def begin(out, blocks):
    """A run that fails after some blocks."""
    with suppress(ZeroDivisionError), open_journal(out, resume=True) as journal:
        journal.accept(PRINT)
        journal.put(outside_key(0), tensors(99))
        for index in range(blocks):
            journal.put(block_key(index), tensors(index), [index])
        raise ZeroDivisionError


def test_what_was_put_is_there_again(out):
    begin(out, 3)
    with open_journal(out, resume=True) as journal:
        journal.accept(PRINT)
        assert journal.done == 3
        assert journal.notes(block_key(2)) == [2]
        assert torch.equal(journal.pieces(block_key(1))["w1"].read(), tensors(1)["w1"])
        pieces, digests = journal.everything()
        assert pieces.keys() == digests.keys() == {"w0", "w1", "w2", "w99"}
        journal.remove()
    assert list(out.parent.iterdir()) == []


def test_a_run_without_a_finished_block_leaves_nothing(out):
    begin(out, 0)
    assert list(out.parent.iterdir()) == []


def test_what_a_kill_before_the_first_block_leaves_is_no_obstacle(out):
    folder = unfinished_folder(out)
    (folder / "model").mkdir(parents=True)
    (folder / "fingerprint.json").write_text('{"model": "half')
    (folder / "block-00000.tmp").write_text("half")
    with open_journal(out, resume=False) as journal:
        assert [path.name for path in folder.iterdir()] == ["lock"]
        journal.accept(PRINT)
        assert journal.done == 0


def test_an_unfinished_run_needs_resume(out):
    begin(out, 2)
    with (
        pytest.raises(SlabError, match=r"2 blocks are done\): continue it with --resume"),
        open_journal(out, resume=False),
    ):
        pass
    assert unfinished_folder(out).is_dir()


def test_every_difference_is_named(out):
    begin(out, 1)
    other = {"model": "n", "setting ratio": "0.5", "setting rank": "2"}
    with (
        pytest.raises(SlabError, match=r"another model \(was m, is n\), setting rank \(was None, is 2\): go back"),
        open_journal(out, resume=True) as journal,
    ):
        journal.accept(other)
    many = dict.fromkeys("abcde", "x")
    with pytest.raises(SlabError, match="and 4 more: go back"), open_journal(out, resume=True) as journal:
        journal.accept(many)
    assert json.loads((unfinished_folder(out) / "fingerprint.json").read_text()) == PRINT


@pytest.mark.parametrize("damage", ["flip", "cut", "gap"])
def test_blocks_from_the_first_damaged_one_on_are_dropped(out, damage):
    begin(out, 4)
    path = unfinished_folder(out) / "block-00002.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with open_journal(out, resume=True) as journal:
        journal.accept(PRINT)
        assert journal.done == 2
        assert sorted(p.stem for p in journal.folder.glob("block-*")) == ["block-00000", "block-00001"]


def test_a_damaged_tensor_outside_the_blocks_is_dropped_alone(out):
    begin(out, 1)
    path = unfinished_folder(out) / "outside-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with open_journal(out, resume=True) as journal:
        journal.accept(PRINT)
        assert (journal.done, journal.has(outside_key(0))) == (1, False)


def test_a_target_whose_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    match = "writing .* failed, nothing was changed there"
    with pytest.raises(SlabError, match=match), open_journal(tmp_path / "file" / "out", resume=False):
        pass


def test_what_a_process_with_this_number_has_left_is_no_obstacle(out):
    """In a container the dead and the living are all process 1."""
    left = out.parent / f".{out.name}.partial-{os.getpid()}"
    left.mkdir(parents=True)
    (left / "block-00000.safetensors").write_text("half")
    begin(out, 1)
    with open_journal(out, resume=True) as journal:
        journal.accept(PRINT)
        journal.remove()
    assert list(out.parent.iterdir()) == [left]
    remove_abandoned(out)
    assert list(out.parent.iterdir()) == []


def test_what_is_being_removed_is_left_to_its_remover(out, monkeypatch):
    """The journal has its lock in it, whatever its name: a kill in the middle of removing leaves what others remove."""
    begin(out, 1)
    with open_journal(out, resume=True) as journal:
        journal.accept(PRINT)
        with monkeypatch.context() as patched:
            patched.setattr("slablm.compression.journal.shutil.rmtree", lambda *args, **kwargs: None)
            journal.remove()
        (doomed,) = out.parent.iterdir()
        assert doomed.name.startswith(f".{out.name}.partial-")
        remove_abandoned(out)
        assert doomed.exists()
    remove_abandoned(out)
    assert list(out.parent.iterdir()) == []
