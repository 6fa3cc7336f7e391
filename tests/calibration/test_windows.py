"""Which windows of a text are taken, and how each begins."""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from slablm import SlabError
from slablm.calibration.text import load_text
from slablm.calibration.windows import (
    EvaluationText,
    adds_bos,
    calibration_pool,
    calibration_windows,
    check_disjoint,
    cut,
    draw,
    sample_windows,
    windows_wanted,
)
from slablm.config import Excerpt

TEXT = "abcdefghij" * 10


@pytest.fixture(scope="module")
def plain_tokenizer(tokenizer):
    """The same bytes, with nothing in front of a text."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def body(tokenizer):
    return tokenizer(TEXT, add_special_tokens=False)["input_ids"]


def test_every_window_begins_with_bos_where_texts_do(tokenizer):
    assert adds_bos(tokenizer)
    windows = cut(TEXT, tokenizer, 8, Excerpt("text"))
    assert windows.ids.shape == (100 // 7, 8)
    assert (windows.ids[:, 0] == tokenizer.bos_token_id).all()
    assert windows.ids[:, 1:].flatten().tolist() == body(tokenizer)[:98]
    assert windows.spans[:2] == ((0, 7), (7, 14))


def test_without_bos_the_text_is_cut_as_the_literature_does(tokenizer):
    windows = cut(TEXT, tokenizer, 8, Excerpt("text"), bos=False)
    assert windows.ids.flatten().tolist() == tokenizer(TEXT)["input_ids"][:96]
    assert (windows.ids[:, 0] == tokenizer.bos_token_id).sum() == 1


def test_a_tokenizer_that_adds_no_bos_is_left_alone(plain_tokenizer):
    assert not adds_bos(plain_tokenizer)
    with_bos, without = (cut(TEXT, plain_tokenizer, 8, Excerpt("text"), bos=bos).ids for bos in (True, False))
    assert torch.equal(with_bos, without)
    assert with_bos.flatten().tolist() == body(plain_tokenizer)[:96]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("t", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("t@3", [3]),
        ("t@3-5", [3, 4, 5]),
        ("t@7-", [7, 8, 9]),
        ("t@2-9/4", [2, 4, 6, 8]),
        ("t@0-/3", [0, 3, 6]),
    ],
)
def test_ranges_of_windows(text, chosen):
    assert Excerpt.parse(text).chosen(10) == chosen
    assert Excerpt.parse(str(Excerpt.parse(text))) == Excerpt.parse(text)


def test_its_name_has_no_folders():
    assert Excerpt.parse("/home/me@work/c4.txt@0-/4").name == "c4.txt@0-/4"
    assert Excerpt.parse("deep/c4.txt").name == "c4.txt"


@pytest.mark.parametrize("text", ["t@", "t@x", "t@-3", "t@3-x", "t@1-2-3", "@3"])
def test_a_range_that_is_none(text):
    with pytest.raises(SlabError, match="windows of a text are given as TEXT@10-19"):
        Excerpt.parse(text)


@pytest.mark.parametrize("text", ["t@5-3", "t@0-3/0"])
def test_a_range_without_windows(text):
    with pytest.raises(SlabError, match="names no window"):
        Excerpt.parse(text)


@pytest.mark.parametrize("text", ["t@10", "t@3-10", "t@10-", "t@2-4/4"])
def test_a_range_beyond_the_text(text):
    with pytest.raises(SlabError, match="needs more windows than there are: the text has 10"):
        Excerpt.parse(text).chosen(10)


def test_a_file_may_be_called_like_a_range(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text@3").touch()
    assert Excerpt.parse("text@3") == Excerpt("text@3")


def test_too_little_text_says_how_much_there_is(tokenizer):
    with pytest.raises(SlabError, match="text t is too short: 10 tokens make no window of 16"):
        cut("abcdefghij", tokenizer, 16, Excerpt("t"))


def test_evaluation_takes_the_first_windows_of_a_range(text_file, tokenizer):
    everything = EvaluationText.read(str(text_file), 32).cut(tokenizer, 32)
    first = EvaluationText.read(f"{text_file}@3-", 32, max_windows=2).cut(tokenizer, 32)
    assert torch.equal(first.ids, everything.ids[3:5])
    assert first.spans == everything.spans[3:5]


def test_calibration_windows_are_drawn_from_the_range(tiny_model, tokenizer, quick):
    config = replace(quick, calibration=f"{quick.calibration}@10-29", seed=5)
    pool = calibration_pool(tokenizer, config).ids
    everything = cut(load_text(quick.calibration, split="calibration"), tokenizer, 32, Excerpt("text")).ids
    assert torch.equal(pool, everything[10:30])
    drawn = calibration_windows(tiny_model, tokenizer, config)
    assert drawn.shape == (windows_wanted(config), 32) == (6, 32)
    rows = {tuple(window) for window in pool.tolist()}
    assert len({tuple(window) for window in drawn.tolist()} & rows) == 6


def test_the_seed_chooses_the_windows(tiny_model, tokenizer, quick):
    first, again, other = (calibration_windows(tiny_model, tokenizer, replace(quick, seed=s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_calibrates_does_not_depend_on_what_is_measured(quick):
    pool = torch.arange(40).view(20, 2)
    few, all_but_one = (draw(pool, replace(quick, num_samples=n)) for n in (4, 19))
    assert torch.equal(few, all_but_one[:6])
    assert len(all_but_one) == 20  # one window is left for measuring, where two would be welcome


def test_a_text_with_too_few_windows(tokenizer, quick):
    with pytest.raises(SlabError, match=r"is too short: it has 3 windows of 32 tokens, 4 are needed"):
        draw(calibration_pool(tokenizer, replace(quick, calibration=f"{quick.calibration}@0-2")).ids, quick)


def test_windows_of_one_text_must_not_overlap(tokenizer):
    first, second = (cut(TEXT, tokenizer, 8, Excerpt.parse(text)) for text in ("t@0-5", "t@6-9"))
    longer = cut(TEXT, tokenizer, 16, Excerpt.parse("t@2-3"))  # tokens 30 to 60
    other = cut("x" + TEXT, tokenizer, 8, Excerpt("t"))
    check_disjoint([("calibration", first), ("evaluation", second), ("development", other)])
    for windows in (first, second):
        with pytest.raises(SlabError, match="here and there share windows of one text"):
            check_disjoint([("here", windows), ("there", longer)])


def test_windows_that_calibrate_nothing_do_not_change_self_generated_text(tiny_model, tokenizer, quick):
    windows = calibration_windows(tiny_model, tokenizer, replace(quick, calibration="self", seed=3))
    assert windows.shape == (6, 32)
    assert torch.equal(windows[:4], sample_windows(tiny_model, tokenizer, 32, 4, seed=3))
    assert len({tuple(window) for window in windows.tolist()}) == 6


def test_self_generated_text_is_reproducible(tiny_model, tokenizer):
    first = sample_windows(tiny_model, tokenizer, 12, 3, seed=1)
    assert first.shape == (3, 12)
    assert (first[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(first, sample_windows(tiny_model, tokenizer, 12, 3, seed=1))
    assert not torch.equal(first, sample_windows(tiny_model, tokenizer, 12, 3, seed=2))
