"""What a comparison is judged by: windows, draws and BOS."""

from dataclasses import replace

import pytest
import torch

from slablm import CompressionConfig, SlabError
from slablm.calibration.windows import EvaluationText, calibration_windows
from slablm.comparison.measure import Tasks
from slablm.comparison.protocol import Court


@pytest.fixture
def config(text_file):
    return CompressionConfig("slab", calibration=f"{text_file}@0-19", num_samples=4, seq_len=32)


def court(*texts, development=(), **changes):
    return Court(texts, tuple(development), changes.get("max_windows"), changes.get("seq_len", 32), Tasks())


def test_conditions_hold_the_windows_that_were_asked_for(tiny_folder, tiny_model, tokenizer, text_file, config):
    texts = f"{text_file}@40-/3", "builtin"
    hearing = court(*texts, development=(f"{text_file}@30-39",), max_windows=5).read()
    conditions = hearing.conditions(str(tiny_folder), config, 2, {})
    assert list(conditions.texts) == ["sample.txt@40-/3", "builtin"]
    assert [len(windows) for windows in conditions.texts.values()] == [3, 5]
    for text, windows in zip(texts, conditions.texts.values(), strict=True):
        assert torch.equal(windows, EvaluationText.read(text, 32, 5).cut(tokenizer, 32).ids)
    for seed in (0, 1):
        drawn = replace(config, seed=seed)
        assert torch.equal(conditions.calibration(drawn), calibration_windows(tiny_model, tokenizer, drawn))
    assert not torch.equal(conditions.calibration(config), conditions.calibration(replace(config, seed=1)))
    words = conditions.description
    assert words["BOS"] == "begins each window"
    assert words["calibration windows"] == "4 of 32 tokens, drawn by seed, 2 draws"
    assert words["development windows"] == "sample.txt@30-39"
    assert words["evaluation windows"] == "3 of 32 tokens, 5 of 32 tokens"


def test_without_bos_it_says_so(tiny_folder, text_file, config):
    hearing = court(f"{text_file}@40-49").read()
    with_bos, without = (hearing.conditions(str(tiny_folder), replace(config, bos=bos), 1, {}) for bos in (True, False))
    assert without.description["BOS"] == "none but the text's own"
    assert (with_bos.bos, without.bos) == (True, False)
    (begun,), (plain,) = with_bos.texts.values(), without.texts.values()
    assert not torch.equal(begun, plain)


@pytest.mark.parametrize(
    ("text", "development", "message"),
    [
        ("@19-25", [], "calibration on .*@0-19 and evaluation on .*@19-25 share windows"),
        ("@40-45", ["@10-12"], "calibration on .*@0-19 and development on .*@10-12 share windows"),
        ("@40-45", ["@45-50"], "evaluation on .*@40-45 and development on .*@45-50 share windows"),
    ],
)
def test_windows_with_two_purposes_are_refused(tiny_folder, text_file, config, text, development, message):
    hearing = court(f"{text_file}{text}", development=[f"{text_file}{part}" for part in development]).read()
    with pytest.raises(SlabError, match=message):
        hearing.conditions(str(tiny_folder), config, 1, {})


def test_development_texts_of_one_name_are_all_checked(tiny_folder, text_file, config, tmp_path):
    (tmp_path / text_file.name).write_text("another text " * 100, encoding="utf-8")
    development = [f"{text_file}@10-12", f"{tmp_path / text_file.name}@10-12"]
    hearing = court(f"{text_file}@40-45", development=development).read()
    with pytest.raises(SlabError, match="calibration on .*@0-19 and development on sample.txt@10-12 share windows"):
        hearing.conditions(str(tiny_folder), config, 1, {})


def test_text_that_the_model_writes_is_another_in_every_draw(tiny_folder, config):
    conditions = court("builtin@0-2").read().conditions(str(tiny_folder), replace(config, calibration="self"), 2, {})
    first, second = (conditions.calibration(replace(config, seed=seed)) for seed in (0, 1))
    assert first.shape == second.shape == (6, 32)
    assert not torch.equal(first, second)


def test_too_little_text_for_the_draws_is_found_before_anything_is_measured(tiny_folder, text_file, config):
    few = replace(config, calibration=f"{text_file}@0-2")
    with pytest.raises(SlabError, match="it has 3 windows of 32 tokens, 4 are needed"):
        court("builtin@0-2").read().conditions(str(tiny_folder), few, 1, {})
