"""Files of older versions: written here bit by bit, as FORMAT.md says that they were, and read by `CodedSpec`."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm import SlabError
from slablm.packing import GRID_DTYPE, CodedSpec
from slablm.packing.coded import LARGEST_BITS

DTYPES = st.sampled_from([torch.float16, torch.bfloat16])


@dataclass(frozen=True)
class Written:
    """A weight on a grid: what was written, entry by entry."""

    kept: list  # of every row, the columns
    codes: list  # of every row, the codes of these
    minus: torch.Tensor  # [m, n]
    scales: torch.Tensor
    offsets: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    bits: int
    group_size: int

    @property
    def spec(self):
        m, n = self.minus.shape
        return CodedSpec(m, n, len(self.kept[0]), self.bits, self.group_size, self.left.dtype)

    def parts(self):
        """The tensors of a file."""
        numbers = {"scales": self.scales, "offsets": self.offsets, "left": self.left, "right": self.right}
        n, k = self.minus.shape[1], len(self.kept[0])
        in_codes = -(-n // 5) + -(-k * (self.bits + 1) // 8)
        in_a_plane = 2 * -(-n // 8) + -(-k * self.bits // 8)
        return numbers | (self.signs_in_codes() if in_codes <= in_a_plane else self.signs_in_a_plane())

    def signs_in_codes(self):
        states, codes = [], []
        for kept, row_codes, minus in zip(self.kept, self.codes, self.minus.tolist(), strict=True):
            trits = [0 if j in kept else 2 if sign else 1 for j, sign in enumerate(minus)]
            trits += [1] * (-len(trits) % 5)
            states.append([sum(t * 3**i for i, t in enumerate(trits[at : at + 5])) for at in range(0, len(trits), 5)])
            signed = [c + 2**self.bits * minus[j] for c, j in zip(row_codes, kept, strict=True)]
            codes.append(in_bytes([code >> i & 1 for code in signed for i in range(self.bits + 1)]))
        return {"states": as_bytes(states), "codes": as_bytes(codes)}

    def signs_in_a_plane(self):
        n = self.minus.shape[1]
        positions = [in_bytes([int(j in kept) for j in range(n)]) for kept in self.kept]
        signs = [in_bytes([int(sign) for sign in row]) for row in self.minus.tolist()]
        codes = [in_bytes([code >> i & 1 for code in row for i in range(self.bits)]) for row in self.codes]
        return {"positions": as_bytes(positions), "signs": as_bytes(signs), "codes": as_bytes(codes)}

    def dense(self, grid_dtype):
        """The formula, entry by entry: kept ones in float32 and rounded once, the rest a product."""
        left, right = self.left.float(), self.right.float()
        result = torch.where(self.minus, -left * right, left * right)
        for i in range(len(result)):
            for j, code in zip(self.kept[i], self.codes[i], strict=True):
                size = self.scales[i, j // self.group_size].float() * (self.offsets[i].float() + code)
                result[i, j] = (-size if self.minus[i, j] else size).to(grid_dtype).float()
        return result


def in_bytes(bits):
    """Eight to a byte, the first the lowest."""
    return [sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]


def as_bytes(rows):
    return torch.tensor(rows, dtype=torch.uint8)


def made_up(m, n, k, bits, group_size, seed=0, factor_dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (m, k), generator=generator)
    offsets = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[torch.randint(0, 7, (m,), generator=generator)]
    return Written(
        kept=[sorted(torch.randperm(n, generator=generator)[:k].tolist()) for _ in range(m)],
        codes=codes.tolist(),
        minus=torch.rand(m, n, generator=generator) < 0.5,
        scales=(torch.rand(m, -(-n // group_size), generator=generator) + 2.0**-14).half(),
        offsets=offsets.half(),
        left=(torch.rand(m, 1, generator=generator) + 0.1).to(factor_dtype),
        right=(torch.rand(1, n, generator=generator) + 0.1).to(factor_dtype),
        bits=bits,
        group_size=group_size,
    )


@st.composite
def written(draw, factor_dtypes=DTYPES):
    """Of any shape, with any share of entries kept, so signs lie in either place."""
    m, n = draw(st.integers(1, 7)), draw(st.integers(1, 43))
    k, bits = draw(st.integers(1, n)), draw(st.integers(1, LARGEST_BITS))
    return made_up(m, n, k, bits, draw(st.integers(1, 50)), draw(st.integers(0, 1000)), draw(factor_dtypes))


@given(written())
def test_what_was_written_is_read(weight):
    """Factors of bfloat16 too: FP16 holds their numbers, perhaps after a shift from one factor to the other."""
    parts, spec = weight.parts(), weight.spec
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == spec.parts()
    assert spec.nbytes == sum(part.nbytes for part in parts.values())
    packed = spec.from_parts(parts)
    packed.validate("w")
    assert torch.equal(packed.dense(), weight.dense(torch.float16))
    assert packed.values.dtype == packed.left.dtype == packed.right.dtype == torch.float16
    assert packed.values.shape == (spec.out_features, spec.kept)
    assert packed.signs


@given(written(factor_dtypes=st.just(torch.bfloat16)))
def test_a_grid_in_bfloat16(weight):
    """Models of that type before format 4."""
    old = weight.spec
    spec = CodedSpec(old.out_features, old.in_features, old.kept, old.bits, old.group_size, *[torch.bfloat16] * 2)
    packed = spec.from_parts(weight.parts())
    assert torch.equal(packed.dense(), weight.dense(torch.bfloat16))
    assert packed.values.dtype == packed.left.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", range(1, LARGEST_BITS + 1))
@pytest.mark.parametrize("k", [8, 16, 25, 40])
def test_both_places_of_signs_at_every_number_of_bits(bits, k):
    """Of 40 entries: the plane takes less with many kept ones; from 17 to 24 it depends."""
    weight = made_up(3, 40, k, bits, 16)
    parts = weight.parts()
    assert ("states" in parts) == weight.spec.sign_in_code == (k <= 16)
    assert torch.equal(weight.spec.from_parts(parts).dense(), weight.dense(torch.float16))


def test_a_row_by_hand():
    """Five entries, the second and fourth kept, 3-bit codes 5 and 6 with signs − and +, s = 0.5, a = 1.5."""
    spec = CodedSpec(1, 5, kept=2, bits=3, group_size=128, factor_dtype=torch.float16)
    assert spec.sign_in_code
    half = torch.float16
    parts = {
        "states": as_bytes([[1 + 0 * 3 + 2 * 9 + 0 * 27 + 1 * 81]]),  # + kept − kept +
        "codes": as_bytes([[0b1101 | 0b0110 << 4]]),
        "scales": torch.tensor([[0.5]], dtype=half),
        "offsets": torch.tensor([1.5], dtype=half),
        "left": torch.tensor([[2.0]], dtype=half),
        "right": torch.tensor([[1.0, 9.0, 3.0, 9.0, 5.0]], dtype=half),
    }
    assert spec.from_parts(parts).dense().tolist() == [[2.0, -3.25, -6.0, 3.75, 10.0]]


def test_true_and_paper_size_of_three_bit_values():
    spec = CodedSpec(64, 640, kept=320, bits=3, group_size=128, factor_dtype=torch.bfloat16)
    # Two bitmaps, 320 codes of 3 bits, 5 scales and an offset in every row; the factors.
    assert spec.nbytes == 64 * (2 * 80 + 120 + 2 * 6) + 2 * (64 + 640)
    # Positions are free.
    assert spec.paper_bits == 64 * (3 * 320 + 640 + 16 * 6) + 16 * (64 + 640)


@pytest.mark.parametrize("shift", [-18, 0, 18])
def test_factors_that_fp16_holds_after_a_shift(shift):
    """Numbers of bfloat16 beyond both ends of FP16: a power of two goes from one factor to the other."""
    weight = made_up(4, 12, 5, 3, 4, factor_dtype=torch.bfloat16)
    left, right = weight.left * 2.0**shift, weight.right * 2.0**-shift
    packed = weight.spec.from_parts(weight.parts() | {"left": left, "right": right})
    assert torch.equal(packed.dense(), weight.dense(torch.float16))
    assert packed.left.dtype == packed.right.dtype == torch.float16


@pytest.mark.parametrize("part", ["left", "right"])
@pytest.mark.parametrize("value", [2.0**-30, 1e30, math.inf, math.nan])
def test_factors_too_far_apart_are_refused(part, value):
    weight = made_up(4, 12, 5, 3, 4, factor_dtype=torch.bfloat16)
    parts = weight.parts()
    parts[part].view(-1)[0] = value
    with pytest.raises(SlabError, match=r"layer: factors of an older format that torch\.float16 cannot hold: compress"):
        weight.spec.from_parts(parts, "layer")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero", [["left"], ["right"], ["left", "right"]])
def test_factors_of_zeros(zero, dtype):
    """No power of two makes them as large as the other factor: that was refused."""
    weight = made_up(4, 12, 5, 3, 4, factor_dtype=dtype)
    parts = weight.parts()
    for part in zero:
        parts[part].zero_()
    dense = weight.spec.from_parts(parts).dense()
    assert torch.equal(dense != 0, torch.tensor([[j in kept for j in range(12)] for kept in weight.kept]))


@pytest.mark.parametrize("k", [10, 35])
def test_rows_that_keep_a_wrong_number_of_entries_are_refused(k):
    weight = made_up(6, 40, k, bits=2, group_size=16)
    parts = weight.parts()
    plane = parts["states" if weight.spec.sign_in_code else "positions"]
    assert ("states" in parts) == (k == 10)
    plane[4, 2] = 1 if plane[4, 2] == 0 else 0
    with pytest.raises(SlabError, match="layer: corrupted plane, row 4 keeps"):
        weight.spec.from_parts(parts, "layer")


def test_grids_are_fp16_unless_a_file_says_otherwise():
    assert GRID_DTYPE == made_up(1, 3, 1, 2, 3).spec.grid_dtype == torch.float16
