import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.compression import cpu_sweep
from slablm.methods.symbols_fit import fit_alphabet, nearest_symbols, plain_symbol_sums, symbol_sums
from slablm.methods.trellis import plain_trellis_columns, trellis_columns
from slablm.runtime.kernels import Backend, native
from tests.methods.blocks import blocks, check_settled, random_block

LIBRARY = native.load()
SETS = () if isinstance(LIBRARY, str) else LIBRARY.supported
needs_library = pytest.mark.skipif(not SETS, reason="no compiled kernels")
sets = st.sampled_from(SETS or ("none",))


@needs_library
@given(arguments=blocks, name=sets)
def test_every_tile_gets_its_nearest_values(arguments, name):
    before = copied(arguments)
    check_settled(arguments, *native.trellis_columns(LIBRARY, name, *arguments))
    assert all(a is b or torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("apart", [False, True])
def test_it_chooses_as_plain_torch_does(name, bits, apart):
    """But for ways that are all but equally near, and what follows them."""
    arguments = random_block(128, 300, bits, apart=apart)
    found, expected = native.trellis_columns(LIBRARY, name, *arguments), plain_trellis_columns(*arguments)
    assert torch.equal(found[0][0], expected[0][0])
    assert (found[0] == expected[0]).float().mean() > 0.99


@pytest.mark.parametrize("name", SETS)
def test_all_columns_at_once_may_be_one(name, monkeypatch):
    """As `nearest_symbols` calls it, with rows that are there only to fill up tiles."""
    weight = torch.randn(70, 301, generator=torch.Generator().manual_seed(0))
    alphabet = fit_alphabet(weight, torch.ones(301), 4)
    arguments = weight, alphabet.scales, alphabet.values()
    monkeypatch.setattr(cpu_sweep, "backend", lambda: Backend("reference", "as asked"))
    expected = nearest_symbols(*arguments)
    monkeypatch.setattr(cpu_sweep, "backend", lambda: Backend(name, "as asked", LIBRARY))
    assert (nearest_symbols(*arguments) == expected).float().mean() > 0.999


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("m", [37, 630])
def test_threads_change_nothing(name, m, monkeypatch):
    arguments = random_block(30, m, 4, apart=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = native.trellis_columns(LIBRARY, name, *arguments)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for found, expected in zip(native.trellis_columns(LIBRARY, name, *arguments), alone, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SETS)
def test_arguments_may_be_views(name):
    arguments = random_block(9, 50, 3, apart=True)
    views = [part.mT.contiguous().mT if part.dim() == 2 else part.repeat_interleave(2)[::2] for part in arguments]
    plain = native.trellis_columns(LIBRARY, name, *arguments)
    for found, expected in zip(native.trellis_columns(LIBRARY, name, *views), plain, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SETS)
def test_a_block_may_be_empty(name):
    one = torch.ones(0)
    for current, coefficients, scales in (
        (torch.ones(0, 8), torch.ones(0, 0), torch.ones(8)),
        (torch.ones(3, 0), torch.ones(3, 3), one),
    ):
        divisors, levels = torch.ones(len(current)), torch.arange(4.0)
        for part in native.trellis_columns(LIBRARY, name, current, None, coefficients, divisors, scales, levels):
            assert part.shape == current.shape


@needs_library
@pytest.mark.parametrize("change", [lambda part: part.double(), lambda part: part[..., 1:]])
@pytest.mark.parametrize("position", range(6))
def test_what_c_would_misread_is_refused(change, position):
    arguments = list(random_block(6, 8, 3, apart=True))
    arguments[position] = change(arguments[position])
    with pytest.raises(RuntimeError, match="a kernel needs float32 numbers"):
        native.trellis_columns(LIBRARY, SETS[0], *arguments)


@needs_library
def test_more_levels_than_symbols_can_name_are_refused():
    arguments = random_block(2, 8, 7, apart=False)
    with pytest.raises(RuntimeError, match="refused its arguments"):
        native.trellis_columns(LIBRARY, SETS[0], *arguments)


@pytest.mark.parametrize("name", [*SETS, "reference"])
def test_the_operator_runs_what_the_environment_names(name, monkeypatch):
    monkeypatch.setenv("SLABLM_KERNEL", name)
    called = []
    monkeypatch.setattr(native, "trellis_columns", lambda _, name, *given: called.append(name) or plain(*given))
    plain = plain_trellis_columns
    trellis_columns(*random_block(2, 3, 2, apart=False))
    assert called == ([] if name == "reference" else [name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_otherwise_it_is_plain_torch(dtype, monkeypatch):
    """Without a library, and for other numbers than float32."""
    if dtype == torch.float32:
        monkeypatch.setattr(cpu_sweep, "backend", lambda: Backend("reference", "not here"))
    arguments = [part if part is None else part.to(dtype) for part in random_block(9, 50, 3, apart=True)]
    for found, expected in zip(trellis_columns(*arguments), plain_trellis_columns(*arguments), strict=True):
        assert torch.equal(found, expected)


@given(st.integers(0, 9), st.integers(1, 70), st.integers(2, 6), st.integers(0, 1000))
def test_sums_in_one_pass_are_those_of_one_symbol_after_the_other(m, n, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    signed, importance = torch.randn(m, n, generator=generator), torch.rand(n, generator=generator)
    # Views, and fewer symbols than there could be.
    codes = torch.randint(2**bits - 1, (n, m), generator=generator).to(torch.uint8).T
    for found, expected in zip(
        symbol_sums(signed, importance, codes, 2**bits),
        plain_symbol_sums(signed, importance, codes, 2**bits),
        strict=True,
    ):
        assert found.shape == (m, 2**bits)
        torch.testing.assert_close(found, expected)


def copied(arguments):
    return [part if part is None else part.clone() for part in arguments]


def test_a_compression_uses_it():
    """Whoever compresses a layer has it registered: nothing but the time would tell that it is not."""
    code = "import sys, slablm.compression.layer; sys.exit('slablm.compression.cpu_sweep' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
