"""A model from a quantised file: one line on stderr says so, whatever the verb."""

import json

import pytest

from .test_cli import slablm


@pytest.fixture(scope="module")
def short(text_file):
    return ["--calibration", text_file, "--num-samples", 2, "--seq-len", 32]


@pytest.fixture(scope="module")
def verbs(short, tmp_path_factory):
    """Verb → what stands before and after the model."""
    out = tmp_path_factory.mktemp("out")
    text = ["--text", "builtin", "--max-windows", 2]
    one_pattern = ["--patterns", "unstructured"]
    return {
        "plan": short,
        "eval": [*text, "--seq-len", 32],
        "compress": [out / "compressed", "--method", "wanda", *short],
        "compare": [*("--out", out / "table", "--methods", "wanda", "--ratios", 0.5), *one_pattern, *short, *text],
    }


@pytest.mark.parametrize("verb", ["plan", "eval", "compress", "compare"])
def test_one_line_and_json_stays_json(verb, verbs, tiny_gguf):
    done = slablm(verb, tiny_gguf, *verbs[verb], "--json")
    assert done.returncode == 0, done.stderr
    line = f"{tiny_gguf}: weights come from a Q4_1 file, so they lie on its grid"
    assert done.stderr.splitlines().count(line) == 1
    assert "grid" not in done.stdout
    json.loads(done.stdout)


def test_a_dense_model_gets_no_such_line(tiny_folder):
    done = slablm("eval", tiny_folder, "--text", "builtin", "--max-windows", 2, "--seq-len", 32, "--json")
    assert done.returncode == 0, done.stderr
    assert "grid" not in done.stderr
