"""From records to what a reader sees: rows with paired differences, verdicts, and the words of the headline.

Methods are compared within a setting (`Cell.setting`): the same ratio and pattern, or the same bits and group size.
Every row is compared with the *reference* of its setting: ``slab`` where it was measured, otherwise the method with
the lowest perplexity. Perplexities are paired per window, accuracies per question (`slablm.evaluation.paired`). Rivals
from files stand beside the settings.

A cell that was measured with several draws of calibration windows is one row: its losses are means over the draws,
window by window, and the spread of the draws' perplexities is shown beside their (geometric) mean. The intervals are
over windows; what they leave out, the chance of the draw, is in that spread.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from slablm.comparison.records import OnText, Record
from slablm.evaluation.divergence import Divergence
from slablm.evaluation.paired import PairedDifference, average_difference, paired_difference
from slablm.evaluation.zeroshot import TaskResult
from slablm.methods.drift import mean_drift

SLAB = "slab"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        record: the measured cell.
        reference: method of the setting's reference; None where there is nothing to compare with.
        loss: log-loss of this row minus the reference's; None for the reference itself.
        accuracy: mean accuracy of this row minus the reference's, as `loss`; None also without tasks.
    """

    record: Record
    reference: str | None
    loss: PairedDifference | None
    accuracy: PairedDifference | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, NaN as None."""
        record = self.record
        return {
            "method": record.cell.method,
            "setting": record.cell.setting,
            "compression_ratio": record.compression_ratio,
            "bits_per_weight": record.bits_per_weight,
            "model_bits_per_weight": record.model_bits_per_weight,
            "perplexity": record.perplexity.value,
            "stderr": _number(record.perplexity.stderr),
            "ratio_to_dense": record.ratio_to_dense,
            "texts": {name: _on_text(on_text) for name, on_text in record.texts.items()},
            "layer_error": record.layer_error,
            "unseen_layer_error": record.unseen_error,
            "drift": record.last_drift,
            "reference": self.reference,
            "log_loss_difference": _difference(self.loss),
            "average_accuracy": record.average_accuracy,
            "accuracies": {task: result["acc"] for task, result in (record.accuracies or {}).items()} or None,
            "accuracy_difference": _difference(self.accuracy),
        }


@dataclass(frozen=True)
class Verdict:
    """The reference of a setting against the best of the others.

    Attributes:
        setting: the setting.
        reference: record of the reference.
        rival: the record with the lowest perplexity among the others.
        loss: log-loss of the reference minus the rival's.
        accuracy: mean accuracy likewise, against the same rival; None without tasks.
    """

    setting: str
    reference: Record
    rival: Record
    loss: PairedDifference
    accuracy: PairedDifference | None

    @property
    def clear(self) -> bool:
        """Whether the interval of the perplexities leaves out "no difference"."""
        low, high = self.loss.interval
        return low > 0 or high < 0


def pooled(records: Sequence[Record]) -> list[Record]:
    """One record per cell, in order: the mean over its draws."""
    draws: dict[Any, list[Record]] = {}
    for record in records:
        draws.setdefault(record.cell.undrawn, []).append(record)
    return [group[0] if len(group) == 1 else _mean(group) for group in draws.values()]


def settings(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each setting, in order; without the dense model and rivals."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.cell.config is not None:
            groups.setdefault(record.cell.setting, []).append(record)
    return groups


def rows(records: Sequence[Record]) -> list[Row]:
    """One row per record, in order."""
    references = {setting: _reference(group) for setting, group in settings(records).items() if len(group) > 1}
    return [_row(record, references.get(record.cell.setting)) for record in records]


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """One verdict per setting with at least two methods."""
    found = []
    for setting, group in settings(records).items():
        reference = _reference(group)
        others = [record for record in group if record is not reference]
        if others:
            rival = min(others, key=lambda record: record.perplexity.value)
            difference, accuracy = loss_difference(rival, reference), accuracy_difference(rival, reference)
            found.append(Verdict(setting, reference, rival, difference, accuracy))
    return found


def headline(records: Sequence[Record]) -> str:
    """The outcome in one sentence."""
    pruned = [verdict for verdict in verdicts(records) if not verdict.reference.cell.quantizes]
    if not pruned:
        best = min((r for r in records if not r.cell.dense), key=lambda record: record.perplexity.value)
        return (
            f"Lowest perplexity: {best.cell.label} with {show_perplexity(best)}, {best.ratio_to_dense:.2f} × dense, "
            f"at {best.bits_per_weight:.2f} true bits per weight."
        )
    winners = [min((v.reference, v.rival), key=lambda record: record.perplexity.value).cell.method for v in pruned]
    counts = Counter(winners).most_common()
    total = f"{len(pruned)} setting{'s' if len(pruned) > 1 else ''}"
    text = ", ".join(f"{method} in {count}" for method, count in counts) + f" of {total}"
    if all(verdict.loss.mean < 0 for verdict in pruned):
        lower = sorted(-100 * verdict.loss.relative()[0] for verdict in pruned)
        span = f"{lower[0]:.1f} %" + (f" to {lower[-1]:.1f} %" if len(lower) > 1 else "")
        text += f", {span} below the best of the others"
    doubtful = sum(not verdict.clear for verdict in pruned)
    doubt = f" In {doubtful} of {len(pruned)} the 95 % interval of the difference includes zero." if doubtful else ""
    return f"Lowest perplexity among the pruners: {text}.{doubt}"


def stronger_quantizers(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """The unwelcome part: pruned cells and, for each, the best quantizer that is no larger and no worse.

    Only cells of the reference method (``slab`` if measured) are looked at.
    """
    quantized = [record for record in records if record.cell.quantizes]
    references = [v for group in settings(records).values() if (v := _reference(group)) not in quantized]
    pairs = []
    for record in references:
        better = [
            q
            for q in quantized
            if q.bits_per_weight <= record.bits_per_weight and q.perplexity.value <= record.perplexity.value
        ]
        if better:
            pairs.append((record, min(better, key=lambda q: q.perplexity.value)))
    return pairs


def loss_difference(a: Record, b: Record) -> PairedDifference:
    """Mean log-loss of b minus a, in nats per token, paired per window."""
    return paired_difference(a.perplexity.window_losses, b.perplexity.window_losses)


def accuracy_difference(a: Record, b: Record) -> PairedDifference | None:
    """Mean accuracy of b minus a over the tasks, paired per question within each; None without tasks."""
    if not a.accuracies or not b.accuracies:
        return None
    return average_difference(
        [paired_difference(a.accuracies[task]["correct"], b.accuracies[task]["correct"]) for task in a.accuracies]
    )


def show_perplexity(record: Record, text: str | None = None) -> str:
    """Perplexity ± standard error or, of several draws, from the least to the most; as many decimals as say something.

    Args:
        record: the cell.
        text: on which text; by default the first.
    """
    on_text = record.main if text is None else record.texts[text]
    value, stderr = on_text.perplexity.value, on_text.perplexity.stderr
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2
    shown = f"{value:,.{digits}f}"
    if on_text.draws:
        return f"{shown} ({min(on_text.draws):,.{digits}f} to {max(on_text.draws):,.{digits}f})"
    return shown if math.isnan(stderr) else f"{shown} ± {stderr:,.{digits}f}"


def show_model_bits(record: Record) -> str:
    """True bits per weight of the whole model; empty where they were not counted."""
    return "" if record.model_bits_per_weight is None else f"{record.model_bits_per_weight:.2f}"


def show_divergence(on_text: OnText) -> str:
    """KL divergence from the dense model: mean, median and 99th percentile; empty for the dense model."""
    kl = on_text.divergence
    return "" if kl is None else f"{kl.mean:.3f} ({kl.median:.3f}, {kl.percentile99:.2f})"


def show_errors(record: Record) -> str:
    """Mean relative output errors of the layers, on calibration text and on unseen text, as far as there are any."""
    return " / ".join(f"{error:.3f}" for error in (record.layer_error, record.unseen_error) if error is not None)


def show_drift(record: Record) -> str:
    """Drift behind the last block; empty for the dense model."""
    return "" if record.last_drift is None else f"{record.last_drift:.3f}"


def show_relative(loss: PairedDifference) -> str:
    """Relative difference of perplexities with its interval, in percent; from tenfold on, as a factor."""
    value, low, high = loss.relative()
    if value < 9:
        return _percent(value, low, high)
    return f"× {1 + value:,.1f}" + ("" if math.isnan(low) else f" [{1 + low:,.1f}, {1 + high:,.1f}]")


def show_points(accuracy: PairedDifference) -> str:
    """Difference of accuracies with its interval, in percentage points."""
    return _percent(accuracy.mean, *accuracy.interval, unit="pp")


def show_accuracy(accuracy: float, stderr: float) -> str:
    """An accuracy and its standard error, in percent."""
    return f"{100 * accuracy:.1f}" if math.isnan(stderr) else f"{100 * accuracy:.1f} ± {100 * stderr:.1f}"


def show_average(record: Record) -> str:
    """Mean accuracy over the tasks ± standard error, in percent; empty without tasks."""
    if record.average_accuracy is None or not record.accuracies:
        return ""
    variance = sum(result["stderr"] ** 2 for result in record.accuracies.values())
    return show_accuracy(record.average_accuracy, math.sqrt(variance) / len(record.accuracies))


def _mean(draws: Sequence[Record]) -> Record:
    """The mean of one cell's draws."""
    first = draws[0]
    return replace(
        first,
        bits_per_weight=fmean(record.bits_per_weight for record in draws),
        model_bits_per_weight=_mean_if_all([record.model_bits_per_weight for record in draws]),
        compression_ratio=fmean(record.compression_ratio for record in draws),
        texts={name: _mean_on_text([record.texts[name] for record in draws]) for name in first.texts},
        layer_errors=_means([record.layer_errors for record in draws]),
        unseen_errors=_means([record.unseen_errors for record in draws]),
        drift=tuple(map(mean_drift, zip(*(record.drift for record in draws), strict=True))),
        seconds=_means([record.seconds for record in draws]),
        accuracies=_mean_accuracies(draws),
    )


def _mean_on_text(draws: Sequence[OnText]) -> OnText:
    losses = _by_item([on_text.perplexity.window_losses for on_text in draws])
    kls = [on_text.divergence for on_text in draws if on_text.divergence is not None]
    first = draws[0].perplexity
    dense = first.value / draws[0].ratio_to_dense
    result = replace(first, window_losses=losses)
    return OnText(
        result,
        result.value / dense,
        Divergence(
            _by_item([kl.window_means for kl in kls]),
            fmean(kl.median for kl in kls),
            fmean(kl.percentile99 for kl in kls),
        ),
        tuple(on_text.perplexity.value for on_text in draws),
    )


def _mean_accuracies(draws: Sequence[Record]) -> dict[str, dict[str, Any]] | None:
    """Accuracies with each question's score as the mean over the draws."""
    results = [record.accuracies for record in draws if record.accuracies]
    if not results:
        return None
    return {
        task: TaskResult(_by_item([result[task]["correct"] for result in results])).to_dict() for task in results[0]
    }


def _by_item(draws: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(map(fmean, zip(*draws, strict=True)))


def _means(draws: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(values[name] for values in draws) for name in draws[0] if all(name in v for v in draws)}


def _mean_if_all(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _reference(group: Sequence[Record]) -> Record:
    named = [record for record in group if record.cell.method == SLAB]
    return named[0] if named else min(group, key=lambda record: record.perplexity.value)


def _row(record: Record, reference: Record | None) -> Row:
    if reference is None:
        return Row(record, None, None, None)
    if reference is record:
        return Row(record, record.cell.method, None, None)
    return Row(
        record, reference.cell.method, loss_difference(reference, record), accuracy_difference(reference, record)
    )


def _percent(value: float, low: float, high: float, unit: str = "%") -> str:
    if math.isnan(low):
        return f"{100 * value:+.1f} {unit}".replace("-", "−")
    return f"{100 * value:+.1f} {unit} [{100 * low:+.1f}, {100 * high:+.1f}]".replace("-", "−")


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _on_text(on_text: OnText) -> dict[str, Any]:
    kl = on_text.divergence
    return {
        "perplexity": on_text.perplexity.value,
        "ratio_to_dense": on_text.ratio_to_dense,
        "tokens": on_text.perplexity.tokens,
        "draws": list(on_text.draws) or None,
        "kl_divergence": kl and kl.to_dict(),
    }


def _difference(difference: PairedDifference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {"mean": difference.mean, "interval": [_number(end) for end in difference.interval]}
