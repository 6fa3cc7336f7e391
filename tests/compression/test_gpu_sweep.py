"""The CUDA text: as C++ on the CPU, as machine code that nobody runs, and on a GPU where there is one."""

import ctypes
import shutil
import subprocess

import pytest
import torch
from hypothesis import given

from slablm.compression.gpu_sweep import NAME, SOURCE, Block, nearest_columns_on_gpu
from slablm.methods import slab_plus
from slablm.methods.nearest_columns import nearest_columns, plain_nearest_columns
from slablm.system import cuda
from tests.methods.blocks import blocks, check_settled, random_block
from tests.methods.problems import decomposed, slow_error, stats_of, wide

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The text as C++: the same arguments and results as `nearest_columns`."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("library") / "nearest_columns.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *flags, "-x", "c++", SOURCE, "-o", library], check=True)
    function = getattr(ctypes.CDLL(str(library)), NAME)
    function.argtypes, function.restype = [Block], None

    def settled(*arguments):
        current, levels = arguments[0], arguments[-1]
        columns, errors = torch.full_like(current, torch.nan), torch.full_like(current, torch.nan)
        parts = [part if part is None else part.contiguous() for part in (*arguments, columns, errors)]
        addresses = (None if part is None else part.data_ptr() for part in parts)
        function(Block(*addresses, current.shape[1], current.shape[0], len(levels)))
        return columns, errors

    return settled


@given(arguments=blocks)
def test_the_text_gives_every_entry_its_nearest_value(on_cpu, arguments):
    check_settled(arguments, *on_cpu(*arguments))


@pytest.mark.parametrize("apart", [False, True])
def test_the_text_chooses_as_plain_torch_does(on_cpu, apart):
    """But for entries about halfway between two values, and what follows them."""
    arguments = random_block(128, 300, 7, 2, apart=apart)
    found, expected = on_cpu(*arguments), plain_nearest_columns(*arguments)
    assert agreeing(found[0], expected[0]) > 0.99


def test_slab_plus_is_as_good_with_the_text(on_cpu, monkeypatch):
    weight, gram, held_out = wide()

    def error():
        return slow_error(weight, decomposed(weight, stats_of(gram, held_out), bits=4).dense(), gram)

    plain = error()
    monkeypatch.setattr(slab_plus, "nearest_columns", on_cpu)
    assert error() == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "sm_100"])
@pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))
def test_the_text_compiles(architecture):
    assert NAME.encode() in cuda.compiled(SOURCE.read_text(encoding="utf-8"), architecture)


def test_without_nvrtc_it_is_plain_torch(monkeypatch):
    monkeypatch.setattr(cuda, "missing", lambda: "not here")
    arguments = random_block(9, 5, 3, 2, apart=True)
    for found, expected in zip(nearest_columns_on_gpu(*arguments), plain_nearest_columns(*arguments), strict=True):
        assert torch.equal(found, expected)


@needs_gpu
@given(blocks)
def test_a_gpu_gives_every_entry_its_nearest_value(arguments):
    check_settled(arguments, *nearest_columns(*on_gpu(arguments)))


@needs_gpu
@pytest.mark.parametrize("apart", [False, True])
def test_a_gpu_chooses_as_plain_torch_does(apart):
    arguments = random_block(128, 3000, 7, 2, apart=apart)
    found, expected = nearest_columns(*on_gpu(arguments)), nearest_columns(*arguments)
    check_settled(arguments, *found)
    assert agreeing(found[0].cpu(), expected[0]) > 0.99


def on_gpu(arguments):
    return [part if part is None else part.cuda() for part in arguments]


def agreeing(first, second):
    """Share of entries that are the same."""
    return (first == second).float().mean().item()
