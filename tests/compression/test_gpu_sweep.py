"""The CUDA text: as C++ on the CPU, as machine code that nobody runs, and on a GPU where there is one.

On the CPU a block's threads are fibers (`symbols_host.h`), and Python launches them as it does those of a GPU.
"""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slablm.compression.gpu_sweep import NAME, source, trellis_columns_on_gpu
from slablm.methods import slab_plus, symbols_fit
from slablm.methods.trellis import plain_trellis_columns, trellis_columns
from slablm.system import cuda
from tests.methods.blocks import blocks, check_settled, random_block
from tests.methods.problems import trial_of
from tests.runtime.kernels import symbols_host

needs_nvrtc = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

# What every thread of a warp gets from one of its own group of `width`.
SHUFFLE = """
static inline float __shfl_sync(unsigned, float value, int lane, int width) {
    const unsigned brought = __float_as_uint(value);
    int turn;
    const auto all = exchange(&brought, 1, turn);
    return __uint_as_float(all[threadIdx.x % WARP / width * width + lane][turn][0]);
}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """`trellis_columns_on_gpu` on the CPU; `adverse` is the order in which threads take turns."""
    folder = tmp_path_factory.mktemp("libraries")
    kernels = {}
    for bits in range(2, 7):
        text = f'#include "{symbols_host.HEADER}"\n{SHUFFLE}{source(bits)}LAUNCHER({NAME})\n'
        kernels[source(bits)] = symbols_host.HostKernel(symbols_host.build(text, folder / f"{bits}.so"), NAME)

    def settled(*arguments, adverse=False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "missing", lambda: None)
            patch.setattr(cuda, "kernel", lambda text, name, device: kernels[text])
            patch.setattr(torch.cuda, "device", nullcontext)
            patch.setattr(symbols_host.HostKernel, "adverse", adverse)
            return trellis_columns_on_gpu(*arguments)

    return settled


@settings(max_examples=30)
@given(arguments=blocks, adverse=st.booleans())
def test_the_text_gives_every_tile_its_nearest_values(emulated, arguments, adverse):
    check_settled(arguments, *emulated(*arguments, adverse=adverse))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_the_text_chooses_as_plain_torch_does(emulated, bits):
    """But for tiles with two ways all but equally near, and what follows them."""
    arguments = random_block(40, 130, bits, apart=bits % 2 == 1)
    found, expected = emulated(*arguments), plain_trellis_columns(*arguments)
    assert agreeing(found[0], expected[0]) > 0.98
    assert agreeing(found[1], expected[1]) > 0.98


def test_slab_plus_is_as_good_with_the_text(emulated, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(18, 70, generator=generator), torch.randn(300, 70, generator=generator)
    inputs = inputs + inputs.roll(1, dims=1)

    def error():
        difference = weight - trial_of(weight, inputs.T @ inputs, 3).descended().dense()
        return (inputs @ difference.T).square().sum().item()

    plain = error()
    for module in (slab_plus, symbols_fit):
        monkeypatch.setattr(module, "trellis_columns", emulated)
    assert error() == pytest.approx(plain, rel=0.02)


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "sm_100"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_the_text_compiles(architecture, bits):
    assert f".text.{NAME}\0".encode() in cuda.compiled(source(bits), architecture)


def test_without_nvrtc_it_is_plain_torch(monkeypatch):
    monkeypatch.setattr(cuda, "missing", lambda: "not here")
    arguments = random_block(9, 5, 3, apart=True)
    for found, expected in zip(trellis_columns_on_gpu(*arguments), plain_trellis_columns(*arguments), strict=True):
        assert torch.equal(found, expected)


@needs_gpu
@given(blocks)
def test_a_gpu_gives_every_tile_its_nearest_values(arguments):
    check_settled(arguments, *trellis_columns(*on_gpu(arguments)))


@needs_gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_a_gpu_chooses_as_plain_torch_does(bits):
    arguments = random_block(128, 3001, bits, apart=bits % 2 == 1)
    found, expected = trellis_columns(*on_gpu(arguments)), trellis_columns(*arguments)
    check_settled(arguments, *found)
    assert agreeing(found[0].cpu(), expected[0]) > 0.98


def on_gpu(arguments):
    return [part if part is None else part.cuda() for part in arguments]


def agreeing(first, second):
    """Share of entries that are the same."""
    return (first == second).float().mean().item()
