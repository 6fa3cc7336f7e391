"""The buffer of hidden states holds the same bits in RAM and in a file."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.calibration.activations import Activations

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@given(
    st.integers(1, 6),
    st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 700)),
    st.sampled_from(DTYPES),
    st.integers(0, 20_000),
    st.data(),
)
def test_wherever_a_window_lives(count, shape, dtype, max_bytes, data):
    generator = torch.Generator().manual_seed(count)
    windows = [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
    ram, bounded = Activations(count), Activations(count, max_bytes)
    for number, window in enumerate(windows):
        for buffer in (ram, bounded):
            buffer.append(window)
            assert len(buffer) == number + 1
    changes = st.tuples(st.integers(0, count - 1), st.integers(0, 99))
    for index, seed in data.draw(st.lists(changes, max_size=5)):
        changed = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        ram[index] = bounded[index] = changed
    for a, b in zip(ram, bounded, strict=True):
        assert a.dtype == b.dtype == dtype
        assert a.shape == b.shape == shape
        assert torch.equal(a, b)


def test_no_more_than_the_limit_is_kept():
    window = torch.zeros(1, 4, 256)  # 4096 bytes
    buffer = Activations(10, max_bytes=3 * 4096 + 4095)
    for _ in range(10):
        buffer.append(window.clone())
    assert len(buffer._kept) == 3
    assert buffer._file.used == 7
    with pytest.raises(IndexError):
        buffer[10]


def test_the_file_has_no_name_and_takes_its_place_at_once(tmp_path):
    buffer = Activations(3, max_bytes=0, folder=tmp_path)
    buffer.append(torch.ones(1, 4, 256))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IndexError):
        buffer[1]


def test_a_disk_without_space_is_an_ordinary_error(tmp_path):
    """A sparse file would be accepted here and end the process with SIGBUS later."""
    with pytest.raises(OSError, match="No space left|too large"):
        Activations(1 << 50, max_bytes=0, folder=tmp_path).append(torch.ones(1, 4, 256))
