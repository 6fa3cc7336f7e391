"""The examples run, on a tiny model."""

import re
import runpy
from pathlib import Path

import pytest

from slablm.methods import METHODS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name, *arguments):
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](list(map(str, arguments)))


def test_own_calibration_text(tiny_folder, text_file, tmp_path, capsys):
    sizes = ["--num-samples", 8, "--seq-len", 32, "--windows", 3]
    run("own_calibration_text", tiny_folder, text_file, tmp_path / "out", *sizes)
    said = re.findall(r"^(dense|compressed): perplexity \d+\.\d+ ± \d+", capsys.readouterr().out, re.MULTILINE)
    assert said == ["dense", "compressed"]


def test_a_custom_method(tiny_folder, tmp_path, capsys, monkeypatch):
    for name, method in METHODS.items():  # so that what the example adds is gone after it
        monkeypatch.setitem(METHODS, name, method)
    monkeypatch.setitem(METHODS, "root-wanda", None)
    run("custom_method", tiny_folder, tmp_path, "--num-samples", 4, "--seq-len", 32)
    found = re.findall(r"^(\S+): mean relative output error (0\.\d+), unseen", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in found] == ["magnitude", "root-wanda", "wanda"]
    assert len({error for _, error in found}) == 3
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "root-wanda")


def test_compress_and_serve(tiny_folder, tmp_path, capsys):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    run("compress_and_serve", tiny_folder, tmp_path / "out", "Hello", "--seq-len", 32)
    assert capsys.readouterr().out.startswith("Hello")
