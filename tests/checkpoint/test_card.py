"""The model card can be read: by the hub, whatever names hold, and by people, as a table."""

import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from slablm import CompressionConfig
from slablm.calibration.statistics import SAMPLED_TOKENS
from slablm.calibration.windows import UNSEEN_WINDOWS
from slablm.checkpoint.card import add_results, model_card
from slablm.checkpoint.layer_report import LayerReport
from slablm.methods.drift import Drift

REPORT = LayerReport(
    "q_proj", (64, 64), kept_fraction=0.4, paper_bits=30_000, true_bits=33_000, output_error=0.1, seconds=0.0
)
HEAD = (
    "---\nlicense: other\nlicense_name: ours\nlicense_link: https://a.b/c\nlanguage:\n- en\n- de\ntags: [x]\n---\n# M\n"
)


def card(source="owner/model", left_dense=None, revision=None, **settings):
    config = replace(CompressionConfig("slab"), **settings)
    return model_card(str(source), config, [REPORT], left_dense or {}, revision)


def rows(text):
    """The cells of the table as a renderer sees them."""
    html = MarkdownIt("commonmark").enable("table").render(ModelCard(text).text)
    assert html.count("<table>") == 1
    return [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", html, re.DOTALL)][1:]


@pytest.mark.parametrize(
    "name", ["model", "a: b", "[x]", "# 1", "'\"", "no", "x\n---\ny", "- {a: 1}", "\\x: *y &z !t %"]
)
def test_the_head_is_yaml_whatever_the_name(name):
    data = ModelCard(card(f"owner/{name}")).data
    assert data.base_model == f"owner/{name}"
    assert data.base_model_relation == "quantized"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["slablm", "slab", "compressed"]
    assert data.license is None


def test_bars_and_lines_stay_in_their_cell():
    text = card(ignore=("re:q_proj|k_proj", "a\nb"), targets=("x`y",), calibration="dir/a | b.txt")
    cells = rows(text)
    assert all(len(row) == 2 for row in cells), cells
    shown = dict(cells)
    assert shown["<code>ignore</code>"] == "<code>re:q_proj|k_proj, a b</code>"
    assert shown["<code>targets</code>"] == "<code>x`y</code>"
    assert shown["<code>calibration</code>"] == "<code>a | b.txt</code>"


def test_what_is_left_dense_is_no_row_of_the_table():
    text = card(left_dense={"model.x|y": "ignored by 're:.*'", "z": "a *b*"})
    assert all(len(row) == 2 for row in rows(text))
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert (
        "<p>Left dense inside the blocks: <code>model.x|y</code> (ignored by 're:.*'), <code>z</code> (a *b*).</p>"
        in html.replace("&#x27;", "'")
    )
    assert "Left dense" not in card()


def test_the_ratio_is_the_one_that_was_reached():
    text = card(ratio=0.3)
    assert "method **slab** to a ratio of 0.5422" in text
    assert rows(text)[0] == ["compression ratio (paper's accounting)", "0.5422"]


def test_licence_and_language_of_a_local_model(tmp_path):
    (tmp_path / "README.md").write_text(HEAD)
    data = ModelCard(card(tmp_path)).data
    assert (data.license, data.license_name, data.license_link) == ("other", "ours", "https://a.b/c")
    assert data.language == ["en", "de"]
    assert data.base_model is None
    assert "base_model_relation" not in data
    assert str(tmp_path) not in card(tmp_path)


@pytest.mark.parametrize(
    "head", ["", "no card", "---\n[\n---\n", "---\n- a\n---\n", "---\nlicense: [1]\nlanguage: {a: b}\n---\n"]
)
def test_a_card_that_says_nothing(head, tmp_path):
    (tmp_path / "README.md").write_text(head)
    data = ModelCard(card(tmp_path)).data
    assert (data.license, data.language) == (None, None)


def test_licence_of_a_model_in_the_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for branch, commit, licence in (("main", "1" * 40, "mit"), ("old", "2" * 40, "apache-2.0")):
        folder = tmp_path / "models--owner--model" / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        (folder.parents[1] / "refs").mkdir(exist_ok=True)
        (folder.parents[1] / "refs" / branch).write_text(commit)
    assert ModelCard(card()).data.license == "mit"
    assert ModelCard(card(revision="old")).data.license == "apache-2.0"


def test_a_folder_that_looks_like_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert ModelCard(card()).data.base_model is None


def test_the_protocol_of_the_errors_is_that_of_the_code():
    """The card's room stands below that of calibration, so it cannot read these there."""
    assert (SAMPLED_TOKENS, UNSEEN_WINDOWS) == (512, 2)
    drift = [Drift(0.5, 0.25)]
    text = model_card("owner/model", CompressionConfig("slab"), [REPORT], {}, drift=drift)
    assert "at 512 tokens at most" in text
    assert "on two windows" in " ".join(text.split())
    assert "on two windows" not in card()


def test_measured_numbers_stand_in_a_table_with_their_protocol(tmp_path):
    before = card()
    (tmp_path / "README.md").write_text(before)
    add_results(tmp_path, [("perplexity on a|b", "9.1 ± 0.2")], "6 windows")
    add_results(tmp_path, [("arc", "0.5"), ("piqa", "0.6")], "lm-eval")
    add_results(tmp_path, [("perplexity on a|b", "9.2 ± 0.2")], "6 windows")  # measured again
    add_results(tmp_path, [("perplexity on a|b", "9.9 ± 0.4")], "2 windows")
    text = (tmp_path / "README.md").read_text()
    html = MarkdownIt("commonmark").enable("table").render(ModelCard(text).text)
    _, table = re.findall("<table>(.*?)</table>", html, re.DOTALL)
    cells = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", table, re.DOTALL)][1:]
    assert cells == [
        ["arc", "0.5", "lm-eval"],
        ["piqa", "0.6", "lm-eval"],
        ["perplexity on a|b", "9.2 ± 0.2", "6 windows"],
        ["perplexity on a|b", "9.9 ± 0.4", "2 windows"],
    ]
    without = re.sub(r"## Measured\n\n(\|.*\n)+\n", "", text)
    assert without == before + "\n" * (without.endswith("\n") - before.endswith("\n"))
