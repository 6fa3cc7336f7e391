import pytest

from slablm.config import CompressionConfig
from slablm.methods.budget import kept_per_row, overhead


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
    assert kept_per_row(shape, CompressionConfig(ratio=ratio), rank=rank, signs=True) == expected


def test_rounding_of_the_ratio_loses_no_entry():
    assert kept_per_row((10, 10), CompressionConfig(ratio=0.9), rank=0, signs=False) == 1


def test_factors_and_signs_cost_what_the_paper_says():
    assert overhead((576, 576), 1, True) == pytest.approx(1 / 16 + 1152 / 331776)
    assert overhead((576, 576), 0, False) == 0
