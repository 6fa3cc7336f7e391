import pytest

from slablm.config import CompressionConfig
from slablm.methods.budget import kept_per_row, overhead, paper_ratio


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


def test_paper_ratio_inverts_the_budget():
    shape = (576, 576)
    assert paper_ratio(shape, 250, 1, True) == pytest.approx(0.5, abs=1e-3)
    assert paper_ratio(shape, 288, 0, False) == 0.5
    assert overhead(shape, 0, False) == 0
