import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slablm import SlabError
from slablm.evaluation.paired import PairedDifference, average_difference, paired_difference, t_quantile

# Two-sided 95 % points of Student's t as printed in statistical tables.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 60: 2.000, 120: 1.980}


@pytest.mark.parametrize(("degrees", "value"), TABLE.items())
def test_quantiles_are_those_of_the_table(degrees, value):
    assert t_quantile(0.975, degrees) == pytest.approx(value, abs=5.1e-4)


def test_quantiles_with_a_closed_form():
    assert t_quantile(0.975, 1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-9)  # Cauchy
    p = 0.995
    assert t_quantile(p, 2) == pytest.approx((2 * p - 1) * math.sqrt(2 / (1 - (2 * p - 1) ** 2)), rel=1e-9)


def test_many_degrees_give_the_normal_distribution():
    assert t_quantile(0.975, 1e6) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), rel=1e-5)


@given(st.floats(1, 1e4), st.floats(1, 1e4))
def test_more_degrees_never_widen_the_interval(a, b):
    few, many = sorted((a, b))
    assert t_quantile(0.975, many) <= t_quantile(0.975, few) * (1 + 1e-9)


def test_interval_by_hand():
    difference = paired_difference([1.0, 2.0, 4.0, 3.0], [1.5, 2.3, 4.1, 3.7])
    # Differences 0.5, 0.3, 0.1, 0.7: mean 0.4, squares about it 0.01 + 0.01 + 0.09 + 0.09 = 0.2.
    standard_error = math.sqrt(0.2 / 3 / 4)
    assert difference.mean == pytest.approx(0.4)
    assert difference.stderr == pytest.approx(standard_error)
    assert difference.degrees == 3
    assert difference.interval == pytest.approx(
        (0.4 - 3.18245 * standard_error, 0.4 + 3.18245 * standard_error), abs=1e-5
    )


def test_relative_difference_is_the_ratio_of_perplexities():
    a, b = [2.0, 3.0, 3.5], [2.1, 3.4, 3.6]
    relative, low, high = paired_difference(a, b).relative()
    assert 1 + relative == pytest.approx(math.exp(statistics.fmean(b)) / math.exp(statistics.fmean(a)))
    assert low < relative < high


def test_pairing_takes_the_items_own_difficulty_out():
    easy_to_hard = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert paired_difference(easy_to_hard, [x + 0.25 for x in easy_to_hard]).interval == pytest.approx((0.25, 0.25))


def test_one_item_has_no_interval():
    assert all(math.isnan(end) for end in paired_difference([1.0], [2.0]).interval)


def test_average_over_tasks_by_hand():
    parts = [PairedDifference(0.1, 0.03, 99), PairedDifference(0.3, 0.04, 49)]
    average = average_difference(parts)
    assert average.mean == pytest.approx(0.2)
    assert average.stderr == pytest.approx(0.05 / 2)
    assert average.degrees == pytest.approx(0.0025**2 / (0.0009**2 / 99 + 0.0016**2 / 49))


def test_average_of_certain_differences():
    assert average_difference([PairedDifference(0.1, 0.0, 4)] * 2).interval == (0.1, 0.1)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], [])])
def test_values_that_are_no_pairs(a, b):
    with pytest.raises(SlabError, match="must be of the same items"):
        paired_difference(a, b)
