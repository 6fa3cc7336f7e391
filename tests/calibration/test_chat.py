"""Conversations as calibration text."""

import json
from dataclasses import replace

import pytest

from slablm import SlabError
from slablm.api import compress_folder
from slablm.calibration.windows import EvaluationText, calibration_pool
from slablm.compression.options import RunOptions
from slablm.config import Excerpt
from tests.conftest import byte_tokenizer
from tests.serving.folders import TEMPLATE, with_template

TALKS = [
    [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hé?"}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "t\u2028o"}],
]
WRITTEN = ["system: be kind\nuser: hé?\n", "user: one\nassistant: t\u2028o\n"]


@pytest.fixture
def talker():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    return tokenizer


@pytest.fixture
def talks(tmp_path):
    path = tmp_path / "a@1 talks.jsonl"
    lines = [json.dumps({"messages": messages, "source": "x"}, ensure_ascii=False) for messages in TALKS]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_windows_are_cut_from_what_the_template_writes(talker, talks, quick):
    """With one BOS token at the start of each window and none between; or as the template writes it."""
    whole = talker("".join(WRITTEN), add_special_tokens=False)["input_ids"]
    config = replace(quick, calibration=f"chat:{talks}@1-2", seq_len=9)
    pool = calibration_pool(talker, config)
    assert pool.ids[:, 0].tolist() == [talker.bos_token_id] * 2
    assert pool.ids[:, 1:].flatten().tolist() == whole[8:24]
    literal = EvaluationText.read(f"chat:{talks}", 9).cut(talker, 9, bos=False).ids.flatten().tolist()
    written = talker("".join("<s>" + text for text in WRITTEN), add_special_tokens=False)["input_ids"]
    assert literal == written[: len(literal)]
    assert len(literal) > len(written) - 9


def test_a_range_is_told_from_a_name(talks):
    assert Excerpt.parse(f"chat:{talks}") == Excerpt(f"chat:{talks}")
    assert Excerpt.parse(f"chat:{talks}@3").name == "chat:a@1 talks.jsonl@3-3"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("not json", "line 5 is no JSON"),
        ('"messages"', "line 5 is no conversation; each line is"),
        ('{"messages": []}', "line 5 is no conversation"),
        ('{"messages": [{"role": "user"}]}', "line 5 is no conversation"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
            "line 5: the chat template does not take it: system must come first",
        ),
    ],
)
def test_what_is_no_conversation_is_named(talker, talks, quick, line, problem):
    with talks.open("a", encoding="utf-8") as file:
        file.write("\n" + line)
    with pytest.raises(SlabError, match=problem):
        calibration_pool(talker, replace(quick, calibration=f"chat:{talks}"))


def test_a_base_model_has_no_template(talks, quick):
    with pytest.raises(SlabError, match="has no chat template; use plain text"):
        calibration_pool(byte_tokenizer(), replace(quick, calibration=f"chat:{talks}"))
    with pytest.raises(SlabError, match="text file nowhere.jsonl does not exist"):
        calibration_pool(byte_tokenizer(), replace(quick, calibration="chat:nowhere.jsonl"))


def test_a_model_is_compressed_with_conversations(tiny_folder, talks, quick, tmp_path):
    source = with_template(tiny_folder, tmp_path / "talker")
    config = replace(quick, calibration=f"chat:{talks}", num_samples=2, seq_len=8)
    compress_folder(str(source), tmp_path / "out", config, RunOptions())
    assert "`chat:a@1 talks.jsonl`" in (tmp_path / "out" / "README.md").read_text()
