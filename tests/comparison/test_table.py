"""Rows, verdicts and the words for them, on made-up records."""

import math
import re
import statistics
from dataclasses import replace

import pytest

from slablm.comparison import table
from tests.comparison.made_up import drawn, record, small, task_result


def test_both_errors_of_the_layers_are_shown():
    dense, slab = small()[:2]
    seen = statistics.fmean(slab.layer_errors.values())
    assert table.show_errors(slab) == f"{seen:.3f} / 0.432"
    assert table.show_errors(replace(slab, unseen_errors={})) == f"{seen:.3f}"
    assert table.show_errors(dense) == ""


def test_draws_are_one_row_with_their_mean_and_spread():
    draws = drawn("slab", (3.2, 3.3, 3.4), 8.6)
    dense, slab, wanda = table.pooled([record("dense", 3.0, 16), *draws, record("wanda", 3.8, 9.0)])
    assert slab.cell == draws[0].cell
    by_window = zip(*(draw.perplexity.window_losses for draw in draws), strict=True)
    assert slab.perplexity.window_losses == pytest.approx([statistics.fmean(losses) for losses in by_window])
    values = [draw.perplexity.value for draw in draws]
    assert slab.main.draws == tuple(values)
    assert slab.main.ratio_to_dense == pytest.approx(statistics.geometric_mean(d.ratio_to_dense for d in draws))
    assert slab.main.divergence.mean == pytest.approx(statistics.fmean(d.main.divergence.mean for d in draws))
    shown = table.show_perplexity(slab)
    assert shown == f"{slab.perplexity.value:.2f} ({min(values):.2f} to {max(values):.2f})"
    assert [dense.main.draws, wanda.main.draws] == [(), ()]
    assert table.rows([dense, slab, wanda])[2].loss.mean == pytest.approx(0.5, abs=0.02)


def test_answers_of_several_draws_are_means():
    draws = drawn("slab", (3.2, 3.3), 8.6, accuracy=0.5)
    (mean,) = table.pooled(draws)
    for task, result in mean.accuracies.items():
        scores = [draw.accuracies[task]["correct"] for draw in draws]
        assert result["correct"] == [statistics.fmean(both) for both in zip(*scores, strict=True)]
        assert result["acc"] == pytest.approx(statistics.fmean(draw.accuracies[task]["acc"] for draw in draws))


def test_rows_compare_with_slab_within_a_setting():
    records = small()
    rows = table.rows(records)
    assert [row.record for row in rows] == records
    assert [row.reference for row in rows] == [None, "slab", "slab", "slab"]
    assert [row.loss is None for row in rows] == [True, True, False, False]
    wanda, slab = records[2].perplexity, records[1].perplexity
    assert 1 + rows[2].loss.relative()[0] == pytest.approx(wanda.value / slab.value)
    differences = [b - a for a, b in zip(slab.window_losses, wanda.window_losses, strict=True)]
    half = 2.5706 * statistics.stdev(differences) / math.sqrt(6)  # t of 5 degrees
    assert rows[2].loss.interval == pytest.approx((rows[2].loss.mean - half, rows[2].loss.mean + half), abs=1e-6)


def test_without_slab_the_best_is_the_reference():
    rows = table.rows([r for r in small() if r.cell.method != "slab"])
    assert {row.reference for row in rows[1:]} == {"sparsegpt"}


def test_a_method_alone_is_compared_with_nothing():
    assert table.rows(small()[:2])[1].reference is None
    assert table.verdicts(small()[:2]) == []
    assert re.match(r"Lowest perplexity: slab 50 % unstructured with 2\d\.\d\d ± ", table.headline(small()[:2]))


def test_the_verdict_is_against_the_best_of_the_others():
    (verdict,) = table.verdicts(small())
    assert (verdict.reference.cell.method, verdict.rival.cell.method) == ("slab", "sparsegpt")
    assert verdict.clear
    lower = 100 * (1 - verdict.reference.perplexity.value / verdict.rival.perplexity.value)
    assert f"slab in 1 of 1 setting, {lower:.1f} % below" in table.headline(small())


def test_losing_is_said_as_plainly():
    records = [record("slab", 3.9, 8.6), record("wanda", 3.2, 9.0), *small()[:1]]
    (verdict,) = table.verdicts(records)
    assert verdict.loss.mean > 0
    assert table.headline(records) == "Lowest perplexity among the pruners: wanda in 1 of 1 setting."


def test_a_difference_within_its_interval_is_called_so():
    records = [record("slab", 3.3, 8.6), record("wanda", 3.3, 9.0)]
    assert not table.verdicts(records)[0].clear
    assert "In 1 of 1 the 95 % interval of the difference includes zero." in table.headline(records)


def test_accuracies_are_paired_per_question():
    a = record("slab", 3.3, 8.6)
    b = record("wanda", 3.8, 9.0)
    first, second = [1, 1, 0, 1], [1, 0, 0, 0]
    object.__setattr__(a, "accuracies", {"one": task_result(first), "two": task_result(first)})
    object.__setattr__(b, "accuracies", {"one": task_result(second), "two": task_result(first)})
    difference = table.rows([a, b])[1].accuracy
    # Task one: differences 0, −1, 0, −1; task two: none.
    assert difference.mean == pytest.approx(-0.25)
    assert difference.stderr == pytest.approx(math.sqrt(1 / 3 / 4) / 2)
    assert difference.degrees == pytest.approx(3)


def test_quantizers_that_are_smaller_and_better_are_named():
    slab, wanda = record("slab", 3.3, 8.6), record("wanda", 3.8, 9.0)
    better, worse = record("rtn", 3.1, 8.2, value_bits=8), record("rtn", 3.9, 3.2, value_bits=3)
    larger = record("gptq", 3.0, 8.7, value_bits=8)
    assert table.stronger_quantizers([slab, wanda, better, worse, larger]) == [(slab, better)]
    assert table.stronger_quantizers([slab, wanda, worse, larger]) == []


def test_one_window_gives_no_interval_and_no_nan():
    rows = table.rows(small(windows=1))
    assert rows[2].to_dict()["log_loss_difference"]["interval"] == [None, None]
    assert rows[2].to_dict()["stderr"] is None
    assert "nan" not in table.show_relative(rows[2].loss) + table.show_perplexity(rows[2].record)


@pytest.mark.parametrize(
    ("loss", "text"),
    [(3.3, r"27\.\d\d ± 2\.\d\d"), (5.0, r"14\d\.\d ± 1\d\.\d"), (9.0, r"8,\d\d\d ± 7\d\d")],
)
def test_perplexities_are_shown_with_sensible_digits(loss, text):
    assert re.fullmatch(text, table.show_perplexity(record("wanda", loss, 9.0)))


def test_large_differences_are_factors():
    loss = table.rows([record("slab", 3.3, 8.6), record("magnitude", 7.3, 9.0)])[1].loss
    assert re.fullmatch(r"× 5\d\.\d \[5\d\.\d, 5\d\.\d\]", table.show_relative(loss))
