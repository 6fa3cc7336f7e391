import re
from pathlib import Path

import pytest
import torch

from slablm import SlabError
from slablm.system.memory import human_bytes, parse_bytes, peak_resident_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GB", 4_000_000_000), ("1.5 kB", 1500), ("2GiB", 2 << 30), ("7m", 7_000_000), ("12", 12), ("12B", 12)],
)
def test_sizes(text, count):
    assert parse_bytes(text, "--size") == count


@pytest.mark.parametrize("text", ["", "GB", "4XB", "-1GB", "1e9", "4iB", "4 G B"])
def test_no_sizes(text):
    with pytest.raises(SlabError, match=r"--size .* is no size: write it like 4GB, 500MB or 2GiB"):
        parse_bytes(text, "--size")


def test_nothing_is_no_size():
    with pytest.raises(SlabError, match="--size must be at least one byte, got '0.2B'"):
        parse_bytes("0.2B", "--size")


def test_human_sizes_can_be_read_back():
    assert human_bytes(227672272) == "228 MB"
    assert parse_bytes(human_bytes(228_000_000), "--size") == 228_000_000


def test_peak_memory_is_that_of_a_python_with_torch():
    assert peak_resident_bytes() > 50_000_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_an_empty_model_takes_no_memory():
    """Weights that exist for a moment must not pile up: under a limit on memory a deep model could not be opened."""
    from slablm.dense.opening import empty_model
    from tests.conftest import tiny_config

    def data():
        return int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10

    config = tiny_config(hidden_size=1536, intermediate_size=4096, num_hidden_layers=24)
    before = data()
    model = empty_model(config, torch.float16)
    assert sum(parameter.nbytes for parameter in model.parameters()) > 1_000_000_000
    assert data() - before < 150_000_000
