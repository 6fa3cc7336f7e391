import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slablm.config import CompressionConfig
from slablm.errors import SlabError
from slablm.methods import METHODS, LayerStats, RowBudget, SymbolBudget, storage
from slablm.methods.budget import SYMBOL_BITS, kept_per_row, overhead, symbol_budget, symbol_bytes
from slablm.packing import SymbolSpec

SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 700))


@pytest.mark.parametrize(
    ("shape", "ratio", "rank", "expected"),
    [
        ((576, 576), 0.5, 1, 250),  # p = 0.5 − 1/16 − 1152/331776 = 0.434028; · 576 = 250.0
        ((1536, 576), 0.5, 1, 250),  # p = 0.435113; · 576 = 250.6
        ((4096, 4096), 0.5, 1, 1790),  # p = 0.437012; · 4096 = 1790.0
        ((4096, 4096), 0.8, 1, 561),  # p = 0.137012; · 4096 = 561.2
    ],
)
def test_the_papers_budget_by_hand(shape, ratio, rank, expected):
    assert kept_per_row(shape, CompressionConfig("slab", ratio=ratio), rank=rank, signs=True) == expected


def test_rounding_of_the_ratio_loses_no_entry():
    assert kept_per_row((10, 10), CompressionConfig("slab", ratio=0.9), rank=0, signs=False) == 1


def test_factors_and_signs_cost_what_the_paper_says():
    assert overhead((576, 576), 1, True) == pytest.approx(1 / 16 + 1152 / 331776)
    assert overhead((576, 576), 0, False) == 0


@given(SHAPES, st.sampled_from(SYMBOL_BITS))
def test_symbols_take_the_bytes_of_a_file(shape, bits):
    assert symbol_bytes(shape, bits) == SymbolSpec(*shape, bits).nbytes


def test_true_size_of_symbols_by_hand():
    # SmolLM2's down_proj, 576 x 1536: a scale and 4 bits of 1536 symbols per row, 16 levels.
    assert symbol_bytes((576, 1536), 4) == 576 * (768 + 2) + 16
    # A row of 65 takes as much as one of 128, and 5 rows as much as 8.
    assert symbol_bytes((5, 65), 3) == 8 * 128 * 3 // 8 + 2 * 5 + 8


@given(SHAPES, st.floats(2.001, 12))
def test_a_budget_gets_the_most_bits_that_fit(shape, bits_per_weight):
    sizes = {p: 8 * symbol_bytes(shape, p) / math.prod(shape) for p in SYMBOL_BITS}
    fitting = [p for p, size in sizes.items() if size <= bits_per_weight]
    if fitting:
        assert symbol_budget(shape, bits_per_weight) == SymbolBudget(max(fitting))
        return
    with pytest.raises(SlabError, match="are too few for a weight with shape") as caught:
        symbol_budget(shape, bits_per_weight)
    least = float(str(caught.value).split("use at least ")[1].split(",")[0])
    assert sizes[2] <= least < sizes[2] + 0.0101
    assert symbol_budget(shape, least).bits >= 2


@given(SHAPES, st.sampled_from(SYMBOL_BITS))
def test_a_budget_that_is_a_size_has_room_for_it(shape, bits):
    """Though the quotient was rounded."""
    m, n = shape
    assert symbol_budget(shape, 8 * symbol_bytes(shape, bits) / (m * n)).bits == bits


def test_the_refusal_names_the_shape_and_the_least():
    message = r"3 bits per weight are too few for a weight with shape 4x32: use at least 4\.75, or ignore this layer"
    with pytest.raises(SlabError, match=message):
        symbol_budget((4, 32), 3)  # 4 x 64 symbols take 64 bytes, with 4 scales and levels 76: 608 bits for 128 weights


@pytest.mark.parametrize("name", METHODS)
def test_what_is_stored_is_known_beforehand(name):
    config = CompressionConfig(name, ratio=None if METHODS[name].takes_true_bits else 0.3)
    if not METHODS[name].packable:
        with pytest.raises(SlabError, match="has no packed format"):
            storage((64, 96), config)
        return
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    stats = LayerStats(torch.ones(96), 10, torch.empty(0, 96), torch.eye(96))
    result = METHODS[name].function(weight, stats, config)
    if name == "slab+":
        found = SymbolBudget(result.symbol_bits)
    else:
        found = RowBudget(result.kept, result.rank, result.signs is not None)
    assert storage((64, 96), config) == found
