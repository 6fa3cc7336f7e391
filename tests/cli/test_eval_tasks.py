"""``slablm eval --tasks`` and ``--task-file`` as a user meets them."""

import importlib.util
import json

import pytest

from tests.cli.test_cli import refused, slablm

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs `pip install 'slablm[eval]'`"
)


@pytest.fixture
def files(tmp_path):
    rows = {
        "colours": [{"query": f"Question: {i}", "choices": ["red", "a dark blue"], "gold": i % 2} for i in range(5)],
        "places": [{"context_options": ["here", "there"], "continuation": "it is", "gold": 1} for _ in range(3)],
    }
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    return [tmp_path / "colours.jsonl", tmp_path / "places.jsonl"]


@needs_lm_eval
def test_json(tiny_folder, compressed_folder, files):
    for model in (tiny_folder, compressed_folder):
        done = slablm("eval", model, "--task-file", files[0], "--task-file", files[1], "--limit", 4, "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert set(result) == {"tasks", "mean_accuracy"}
        colours, places = result["tasks"]["colours"], result["tasks"]["places"]
        assert (colours["n"], places["n"]) == (4, 3)
        assert colours["acc"] == sum(colours["correct"]) / 4
        assert {"acc_norm", "stderr_norm", "correct_norm"} <= set(colours)
        assert set(places) == {"acc", "stderr", "n", "correct"}
        assert result["mean_accuracy"] == pytest.approx((colours["acc"] + places["acc"]) / 2)


@needs_lm_eval
def test_lines(tiny_folder, files):
    done = slablm("eval", tiny_folder, "--task-file", files[0], "--task-file", files[1], "--batch-size", 4)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("colours  acc ")
    assert "(5 questions), acc_norm " in lines[0]
    assert lines[1].startswith("places   acc ")
    assert lines[1].endswith("± 0.000 (3 questions)")
    assert lines[2].startswith("mean     acc ")


@needs_lm_eval
def test_problems_are_found_before_the_model_is_loaded(files, tmp_path):
    files[0].write_text('{"query": "q", "choices": ["a", "b"], "gold": 5}')
    refused(slablm("eval", "no/such/model", "--task-file", files[0]), r"colours.jsonl', line 1: gold must be .* got 5")
    refused(slablm("eval", "no/such/model", "--task-file", tmp_path / "absent.jsonl"), "cannot be read")
    refused(slablm("eval", "no/such/model", "--tasks", " , "), "no tasks to evaluate")


def test_the_two_measurements_are_not_mixed(tiny_folder, files, text_file):
    refused(slablm("eval", tiny_folder, "--text", text_file, "--limit", 3), "--limit counts for zero-shot tasks")
    refused(slablm("eval", tiny_folder, "--batch-size", 3), "--batch-size counts for zero-shot tasks")
    for option, value in (("--text", text_file), ("--seq-len", 64), ("--max-windows", 1)):
        done = slablm("eval", tiny_folder, "--task-file", files[0], option, value)
        refused(done, f"{option} measures perplexity, --tasks and --task-file accuracy")


def test_limit_below_one(tiny_folder, files):
    done = slablm("eval", tiny_folder, "--task-file", files[0], "--limit", 0)
    assert done.returncode == 2
    assert "--limit" in done.stderr


def test_lm_eval_is_optional(tiny_folder, files, monkeypatch):
    monkeypatch.setattr("slablm.evaluation.zeroshot.importlib.util.find_spec", lambda name: None)
    refused(slablm("eval", tiny_folder, "--task-file", files[0]), r"pip install 'slablm\[eval\]'")
