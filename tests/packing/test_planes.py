import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.packing.planes import STATE_BYTE_LIMIT, pack_bits, pack_states, unpack_bits, unpack_states

masks = st.tuples(st.integers(1, 9), st.integers(1, 43), st.integers(0, 1000))


def random_bits(m, n, seed):
    return torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(masks)
def test_states_round_trip(shape):
    m, n, seed = shape
    mask, signs = random_bits(m, n, seed), random_bits(m, n, seed + 1)
    packed = pack_states(mask, signs)
    assert packed.shape == (m, -(-n // 5))
    assert packed.max() < STATE_BYTE_LIMIT
    factor = unpack_states(packed, n)
    assert torch.equal(factor == 0, mask)
    assert torch.equal((factor < 0) & ~mask, signs & ~mask)


@given(masks)
def test_bits_round_trip(shape):
    m, n, seed = shape
    mask = random_bits(m, n, seed)
    packed = pack_bits(mask)
    assert packed.shape == (m, -(-n // 8))
    assert torch.equal(unpack_bits(packed, n), mask)


def test_layout_by_hand():
    # kept + − kept +  →  0 + 1·3 + 2·9 + 0·27 + 1·81 = 102; the filling of the second byte is + (1).
    mask = torch.tensor([[True, False, False, True, False, True]])
    signs = torch.tensor([[False, False, True, True, False, False]])
    assert pack_states(mask, signs).tolist() == [[102, 0 + 3 + 9 + 27 + 81]]
    assert pack_bits(mask).tolist() == [[0b101001]]
