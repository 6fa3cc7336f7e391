from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm import SlabError
from slablm.packing import pack
from slablm.packing.symbols import pack_symbols
from slablm.packing.tiles import pack_tiles, padded_columns, tiled_shape, unpack_tiles
from tests.methods.test_symbols import random_symbols


@st.composite
def weights(draw):
    bits, m, n = draw(st.integers(2, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 300))
    block = draw(st.sampled_from([b for b in (1, 2, 4, 64) if n % b == 0]))
    return random_symbols(m, n, bits, draw(st.integers(0, 1000)), block)


def symbol_at(packed, bits, n, i, j):
    """One symbol, bit by bit, from FORMAT.md's description."""
    row_of_tiles = packed[i // 4].tolist()
    width = 64 if j // 128 == n // 128 and -(-n // 64) % 2 else 128
    at = j // 128 * 4 * 128 * bits // 8
    symbol = low = 0
    for q in {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2]}[bits]:
        per_row = width * q // 8
        field, byte = divmod(j % 128, per_row)
        symbol |= (row_of_tiles[at + i % 4 * per_row + byte] >> (field * q)) % 2**q << low
        at, low = at + 4 * per_row, low + q
    return symbol


@given(st.integers(1, 9), st.integers(1, 300), st.integers(2, 6), st.integers(0, 1000))
def test_tiles_lie_as_the_format_says(m, n, bits, seed):
    symbols = torch.randint(0, 2**bits, (m, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_tiles(symbols, bits)
    assert packed.shape == tiled_shape(m, n, bits)
    assert torch.equal(unpack_tiles(packed, bits, m, n), symbols)
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randint(0, m * n, (9,), generator=generator).tolist():
        i, j = divmod(place, n)
        assert symbol_at(packed, bits, n, i, j) == symbols[i, j]


@pytest.mark.parametrize("n", [1, 64, 65, 128, 576, 640])
def test_padding_is_at_most_63_columns(n):
    assert n <= padded_columns(n) < n + 64
    packed = pack_tiles(torch.full((1, n), 31, dtype=torch.uint8), 5)
    assert sum(map(int.bit_count, packed.flatten().tolist())) == 5 * n  # all else is 0


@given(weights())
def test_parts_are_bit_exact(weight):
    packed = pack_symbols(weight)
    parts = packed.parts()
    assert packed.nbytes == sum(tensor.nbytes for tensor in parts.values())
    assert packed.spec.parts() == {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
    read = packed.spec.from_parts(parts)
    read.validate("w")
    assert torch.equal(read.dense(), weight.dense())
    assert torch.equal(read.unpack().codes, weight.codes)
    rotation = 0 if weight.rotation is None else 72  # it is in config.json
    assert packed.spec.paper_bits == weight.bits() - rotation


def test_pack_takes_symbols_as_they_are():
    """Whatever type other methods' numbers are stored in."""
    weight = random_symbols(5, 70, 4, block=2)
    packed, expected = pack(weight, torch.bfloat16), pack_symbols(weight)
    assert packed.spec == expected.spec
    for name, tensor in packed.parts().items():
        assert torch.equal(tensor, expected.parts()[name])


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_scales_that_no_weight_has_are_refused(value):
    packed = pack_symbols(random_symbols(4, 20, 3))
    damaged = packed.scales.clone()
    damaged[0] = value
    with pytest.raises(SlabError, match="w: corrupted scales"):
        replace(packed, scales=damaged).validate("w")
