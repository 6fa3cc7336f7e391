import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.methods.rotation import Rotation, hadamard, largest_block, splitmix64


def slow_hadamard(block):
    """Entry (i, j) is −1 where i and j share an odd number of bits, over √b."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(block)


def matrix(rotation):
    """R, written out."""
    blocks = torch.block_diag(*[slow_hadamard(rotation.block)] * (rotation.size // rotation.block))
    return rotation.signs.double()[:, None] * blocks


rotations = st.builds(
    lambda power, count, seed: Rotation(2**power * count, 2**power, seed),
    st.integers(0, 6),
    st.integers(1, 9),
    st.integers(0, 2**64 - 1),
)


def test_splitmix64_is_the_published_generator():
    # The first outputs for seed 0 and 1234567, as every implementation lists them.
    assert splitmix64(0, 3).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(1234567, 5)[[0, 4]].tolist() == [6457827717110365317, 16408922859458223821]
    assert splitmix64(2**64 - 1, 2)[1] == splitmix64(0x9E3779B97F4A7C15 - 1, 1)[0]  # in integers modulo 2⁶⁴


def test_signs_are_both_and_depend_on_the_seed():
    first, second = (Rotation(512, 512, seed).signs for seed in (0, 1))
    assert first.abs().unique().tolist() == [1]
    assert abs(first.sum().item()) < 80
    assert abs((first * second).sum().item()) < 80
    # A longer weight begins with the same signs: they come from a counter.
    assert torch.equal(Rotation(1024, 512, 0).signs[:512], first)


@given(st.integers(0, 7), st.integers(1, 3), st.integers(1, 3))
def test_hadamard_is_the_matrix(power, blocks, rows):
    block = 2**power
    x = torch.randn(rows, block * blocks, generator=torch.Generator().manual_seed(power), dtype=torch.float64)
    expected = x.view(rows, blocks, block) @ slow_hadamard(block)
    torch.testing.assert_close(hadamard(x, block), expected.reshape(rows, -1))
    torch.testing.assert_close(hadamard(hadamard(x, block), block), x)
    torch.testing.assert_close(hadamard(x[0], block), expected.reshape(rows, -1)[0])  # a vector too


@given(rotations)
def test_rotate_is_a_product_with_an_orthogonal_matrix(rotation):
    x = torch.randn(3, rotation.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r = matrix(rotation)
    torch.testing.assert_close(r.T @ r, torch.eye(rotation.size, dtype=torch.float64))
    torch.testing.assert_close(rotation.rotate(x), x @ r)
    torch.testing.assert_close(rotation.restore(x), x @ r.T)
    torch.testing.assert_close(rotation.restore(rotation.rotate(x)), x)


@given(rotations)
def test_a_weight_and_its_inputs_rotate_alike(rotation):
    generator = torch.Generator().manual_seed(1)
    weight, inputs = (torch.randn(k, rotation.size, generator=generator, dtype=torch.float64) for k in (4, 5))
    torch.testing.assert_close(rotation.rotate(inputs) @ rotation.rotate(weight).T, inputs @ weight.T)


@given(rotations)
def test_rotated_gram_is_that_of_rotated_inputs(rotation):
    inputs = torch.randn(7, rotation.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rotated = rotation.rotate(inputs)
    gram = rotation.rotate_gram(inputs.T @ inputs)
    torch.testing.assert_close(gram, rotated.T @ rotated)
    assert torch.equal(gram, gram.T)


def test_rotation_spreads_an_outlier_evenly():
    x = torch.zeros(1, 64)
    x[0, 5] = 8
    assert torch.equal(Rotation(64, 64, 3).rotate(x).abs(), torch.ones(1, 64))


def test_the_callers_tensor_survives():
    x = torch.ones(2, 8)
    Rotation(8, 8, 0).rotate(x)
    Rotation(8, 1, 0).restore(x)
    assert torch.equal(x, torch.ones(2, 8))


@pytest.mark.parametrize(
    ("size", "cap", "block"),
    [(576, None, 64), (1536, None, 512), (640, None, 128), (2048, 256, 256), (2048, 300, 256), (96, 1, 1), (7, 64, 1)],
)
def test_largest_block(size, cap, block):
    assert largest_block(size, cap) == block
    assert size % block == 0


@pytest.mark.parametrize(("size", "block"), [(12, 3), (12, 8), (12, 0), (12, -4)])
def test_block_that_does_not_fit_is_refused(size, block):
    with pytest.raises(ValueError, match="no power of two that divides 12"):
        Rotation(size, block, 0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="64 bits"):
        Rotation(8, 8, seed)
