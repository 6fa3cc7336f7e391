"""`slablm plan` as a user meets it."""

import json
from pathlib import Path

import pytest

from slablm.planning import checks
from tests.cli.test_cli import refused, slablm

LLAMA = Path(__file__).parent.parent / "data" / "llama-3.1-70b"


@pytest.fixture
def options(text_file):
    return ["--calibration", text_file, "--num-samples", 4, "--seq-len", 32, "--iterations", 4]


def test_json_predicts_what_compress_reports(tiny_folder, options, tmp_path):
    options += ["--method", "slab"]
    done = slablm("plan", tiny_folder, tmp_path / "out", *options, "--json")
    assert done.returncode == 0, done.stderr
    predicted = json.loads(done.stdout)
    assert list(tmp_path.iterdir()) == []
    result = json.loads(slablm("compress", tiny_folder, tmp_path / "out", *options, "--json").stdout)
    for key in ("bits_per_weight", "bytes_on_disk", "dense_bytes", "config"):
        assert predicted[key] == result[key], key
    assert predicted["compression_ratio"] == pytest.approx(result["compression_ratio"])
    assert predicted["possible"] is True
    assert predicted["seconds_estimate"]["total"] > 0


def test_a_model_without_weights_on_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(checks, "free_bytes", lambda out: 10**9)
    options = ["--num-samples", 8, "--max-memory", "100MB", "--max-shard-size", "5GB"]
    done = slablm("plan", LLAMA, "--bits-per-weight", 4.2, *options)
    assert done.returncode == 1
    assert max(map(len, done.stdout.splitlines())) <= 80
    text = " ".join(done.stdout.split())
    for phrase in (
        "mlp.down_proj 80 8192×28672",
        "4 bits",
        "true bits per weight (headers included) 4.200",
        "compression ratio (paper, positions not counted) 0.7375",
        "hidden states of all windows 100 MB",
        "buffers of the largest matrix",
        "no weights here",
        "an estimate from a short measurement on this machine",
        "impossible: the disk has 1 GB free where OUT is to be",
    ):
        assert phrase in text, phrase


def test_a_head_in_8_bits(tiny_folder, options, tmp_path):
    options += ["--method", "slab", "--head-bits", 8]
    text = " ".join(slablm("plan", tiny_folder, tmp_path / "out", *options).stdout.split())
    for phrase in (
        "head and embedding 8 bits",
        "left dense: norms",
        "head and embedding: int8, with an FP16 scale per row",
    ):
        assert phrase in text, phrase
    assert "head and embedding 8 bits" in " ".join(
        slablm("compress", tiny_folder, tmp_path / "out", *options).stdout.split()
    )
    assert "head and embedding: 8 bits" in slablm("inspect", tmp_path / "out").stdout
    refused(slablm("plan", tiny_folder, *options[:-1], 4), "head_bits must be 16 or 8, got 4")


def test_impossible_settings_are_listed(tiny_folder, options):
    done = slablm("plan", tiny_folder, *options, "--method", "slab", "--ratio", 0.99)
    assert done.returncode == 1
    assert done.stdout.count("impossible: ") == 4  # four shapes
    assert "nothing stands in the way" not in done.stdout


def test_refusals(tiny_folder, options, tmp_path):
    refused(slablm("plan", tiny_folder, *options, "--method", "gptq"), "no packed format")
    refused(slablm("plan", tmp_path / "nowhere", *options), "does not exist")
    refused(slablm("plan", tiny_folder, *options, "--targets", "nothing"), "pattern 'nothing' matches no linear layer")
