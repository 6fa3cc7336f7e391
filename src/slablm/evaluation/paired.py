"""Paired differences: is one model better than another on the same windows or questions?

Two models measured on the same items share the items' difficulty, so the interval belongs to the differences
d_i = b_i − a_i and not to the two means:

    mean d  ±  t · s / √n        s: standard deviation of the d_i, t: quantile of Student's t with n − 1 degrees

For perplexity the items are windows and the values mean log-losses; exp(mean d) is then exactly the ratio of the two
perplexities, and exp of the ends is its interval. For accuracy the items are questions and the values 0 or 1.

The interval takes the items as independent. Neighbouring windows often come from the same article, so that intervals
over windows are, if anything, too narrow.

The quantile needs no table: with t = √ν · tan θ the density of Student's t becomes cos^(ν−1) θ, so

    P(|T| ≤ t) = 2 Γ((ν+1)/2) / (√π Γ(ν/2)) · ∫₀^arctan(t/√ν) cos^(ν−1) θ dθ,

a smooth integrand over a short range that Simpson's rule integrates to ten digits; bisection inverts it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slablm.errors import SlabError

CONFIDENCE = 0.95
_SIMPSON_INTERVALS = 400


@dataclass(frozen=True)
class PairedDifference:
    """Mean difference b − a over paired items.

    Attributes:
        mean: mean of the differences.
        stderr: its standard error; NaN for a single item.
        degrees: degrees of freedom of the interval.
    """

    mean: float
    stderr: float
    degrees: float

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % confidence interval; NaN for a single item."""
        if math.isnan(self.stderr):
            return math.nan, math.nan
        half = t_quantile(0.5 + CONFIDENCE / 2, self.degrees) * self.stderr
        return self.mean - half, self.mean + half

    def relative(self) -> tuple[float, float, float]:
        """For log-losses: relative difference of the perplexities and the ends of its interval, 0.1 for 10 % more."""
        low, high = self.interval
        return math.expm1(self.mean), math.expm1(low), math.expm1(high)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference:
    """B minus a, paired item by item.

    Args:
        a: one value per item, such as the mean log-loss of a window in nats per token, or 1 for a right answer.
        b: the other model's values of the same items.

    Raises:
        SlabError: different numbers of items, or none.
    """
    if len(a) != len(b) or not a:
        raise SlabError(f"paired values must be of the same items, got {len(a)} and {len(b)}")
    differences = [y - x for x, y in zip(a, b, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count < 2:
        return PairedDifference(mean, math.nan, 0)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    return PairedDifference(mean, math.sqrt(variance / count), count - 1)


def average_difference(parts: Sequence[PairedDifference]) -> PairedDifference:
    """Unweighted mean of independent differences, as for an average over tasks.

    The standard error is √(Σ se²) / parts, the degrees of freedom are Welch's and Satterthwaite's,
    (Σ se²)² / Σ (se⁴ / ν).

    Args:
        parts: one difference per task, at least one.
    """
    mean = math.fsum(part.mean for part in parts) / len(parts)
    total = math.fsum(part.stderr**2 for part in parts)
    if total == 0 or math.isnan(total):
        return PairedDifference(mean, math.sqrt(total), min(part.degrees for part in parts))
    degrees = total**2 / math.fsum(part.stderr**4 / part.degrees for part in parts)
    return PairedDifference(mean, math.sqrt(total) / len(parts), degrees)


def t_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t distribution.

    Args:
        probability: P(T ≤ t), in [0.5, 1).
        degrees: degrees of freedom ν ≥ 1, not necessarily whole.
    """
    wanted = 2 * probability - 1
    low, high = 0.0, 1.0
    while _within(high, degrees) < wanted:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < wanted else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: float) -> float:
    """P(|T| ≤ t)."""
    scale = 2 * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    step = math.atan(t / math.sqrt(degrees)) / _SIMPSON_INTERVALS
    weights = (1 if i in (0, _SIMPSON_INTERVALS) else 4 if i % 2 else 2 for i in range(_SIMPSON_INTERVALS + 1))
    return scale * step / 3 * math.fsum(w * math.cos(i * step) ** (degrees - 1) for i, w in enumerate(weights))
