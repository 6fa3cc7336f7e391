from dataclasses import replace

import pytest
import torch

from slablm import SlabError
from slablm.calibration.text import (
    _take,
    calibration_windows,
    load_text,
    sample_windows,
    windows_from_text,
    windows_wanted,
)


def test_windows_are_consecutive_from_the_start(tokenizer):
    text = "abcdefghij" * 10
    windows = windows_from_text(text, tokenizer, 8, 3, "text")
    ids = tokenizer(text)["input_ids"]
    assert windows.flatten().tolist() == ids[:24]
    assert windows.shape == (3, 8)
    assert windows_from_text(text, tokenizer, 8, None, "text").shape == (len(ids) // 8, 8)


def test_too_little_text_says_how_much_there_is(tokenizer):
    with pytest.raises(SlabError, match="text is too short: 11 tokens make 1 windows of 8, 2 are needed"):
        windows_from_text("abcdefghij", tokenizer, 8, 2, "text")


def test_more_windows_are_taken_where_there_are_as_many(tokenizer):
    text = "abcdefghij" * 3  # 31 tokens
    assert [len(windows_from_text(text, tokenizer, 8, count, "text", more=2)) for count in (1, 2, 3)] == [3, 3, 3]


def test_two_windows_calibrate_nothing(tiny_model, tokenizer, quick):
    windows = calibration_windows(tiny_model, tokenizer, quick)
    assert windows.shape == (windows_wanted(quick), 32) == (6, 32)
    text = load_text(quick.calibration, split="calibration")
    assert torch.equal(windows[:4], windows_from_text(text, tokenizer, 32, 4, "text"))


def test_windows_that_calibrate_nothing_do_not_change_self_generated_text(tiny_model, tokenizer, quick):
    windows = calibration_windows(tiny_model, tokenizer, replace(quick, calibration="self", seed=3))
    assert windows.shape == (6, 32)
    assert torch.equal(windows[:4], sample_windows(tiny_model, tokenizer, 32, 4, seed=3))
    assert len({tuple(window) for window in windows.tolist()}) == 6


def test_builtin_text_is_split():
    calibration, evaluation = (load_text("builtin", split=split) for split in ("calibration", "evaluation"))
    assert len(calibration) > 300_000
    assert len(evaluation) > 50_000
    assert evaluation[:2000] not in calibration


def test_unreadable_files(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    for path, message in ((tmp_path / "binary", "cannot be read as UTF-8"), (tmp_path, "cannot be read")):
        with pytest.raises(SlabError, match=message):
            load_text(str(path), split="calibration")


def test_streams_stop_when_there_is_enough():
    stream = ({"text": "x" * 100} for _ in iter(int, 1))  # never ends
    assert len(_take(stream, 50)) == 4 * 100 + 3 * 2
    assert _take([{"text": "a"}, {"text": "b"}], None) == "a\n\nb"


def test_self_generated_text_is_reproducible(tiny_model, tokenizer):
    first = sample_windows(tiny_model, tokenizer, 12, 3, seed=1)
    assert first.shape == (3, 12)
    assert (first[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(first, sample_windows(tiny_model, tokenizer, 12, 3, seed=1))
    assert not torch.equal(first, sample_windows(tiny_model, tokenizer, 12, 3, seed=2))
