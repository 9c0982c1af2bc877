"""Uncertainty of scores: 95 % intervals over independent units.

Verdicts on questions about one image, or on rotations of one circular question, are correlated. They are one
unit, and units are what is counted or resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmpipe.errors import DataError

_Z = 1.959963984540054
_REPLICATES = 2000
_MANY = 5000


@dataclass(frozen=True)
class MetricEstimate:
    """A headline number with its 95 % interval."""

    metric: str
    value: float
    low: float
    high: float
    units: int
    method: str

    def as_json(self) -> dict[str, Any]:
        """As stored in ``score.json``."""
        ci95 = [self.low, self.high]
        return {"metric": self.metric, "value": self.value, "ci95": ci95, "units": self.units, "method": self.method}


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), (0, 1) for no observation."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    centre = p + _Z**2 / (2 * n)
    spread = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
    scale = 1 + _Z**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def estimate_mean(metric: str, values: Sequence[float], units: Sequence[str], scale: float = 1.0) -> MetricEstimate:
    """The mean of ``values`` times ``scale``.

    Wilson's interval where every unit has one value of 0 or 1; otherwise a bootstrap over units; with more
    than 5000 units the normal interval of the ratio estimator (sum over units / number of values).
    """
    if not values:
        return MetricEstimate(metric, 0.0, 0.0, scale, 0, "none")
    totals: dict[str, list[float]] = {}
    for value, unit in zip(values, units, strict=True):
        entry = totals.setdefault(unit, [0.0, 0.0])
        entry[0] += value
        entry[1] += 1
    mean = math.fsum(values) / len(values)
    if len(totals) == len(values) and all(value in (0, 1) for value in values):
        low, high = wilson(sum(value == 1 for value in values), len(values))
        return MetricEstimate(metric, scale * mean, scale * low, scale * high, len(totals), "wilson")
    if len(totals) > _MANY:
        residual = math.fsum((total - mean * count) ** 2 for total, count in totals.values())
        spread = _Z * math.sqrt(residual * len(totals) / (len(totals) - 1)) / len(values)
        return MetricEstimate(
            metric, scale * mean, scale * (mean - spread), scale * (mean + spread), len(totals), "normal"
        )
    return bootstrap(metric, totals, lambda t: scale * t[..., 0] / t[..., 1], scale * mean)


def bootstrap(
    metric: str, totals: Mapping[str, Sequence[float]], statistic: Callable[[Any], Any], value: float
) -> MetricEstimate:
    """Percentile bootstrap over units of a statistic of sums.

    ``totals`` holds each unit's contribution to K sums; ``statistic`` maps an array (..., K) of sums to
    (...). The resampling is seeded: the same answers give the same interval.
    """
    import numpy as np

    table = np.array([totals[unit] for unit in sorted(totals)], dtype=float)  # (units, K)
    n = len(table)
    generator = np.random.default_rng(0)
    weights = generator.multinomial(n, np.full(n, 1 / n), size=_REPLICATES)  # (replicates, units)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = statistic(weights @ table)
    draws = draws[np.isfinite(draws)]  # a draw without any unit of some category has no score
    low, high = np.quantile(draws, [0.025, 0.975]) if len(draws) else (value, value)
    return MetricEstimate(metric, value, float(low), float(high), n, f"bootstrap of {_REPLICATES}")


def bootstrap_groups(
    metric: str,
    groups: Sequence[str],
    counts: Iterable[tuple[str, str, Sequence[float]]],
    statistic: Callable[[Any], Any],
    value: float,
) -> MetricEstimate:
    """The same for sums that are kept apart by group.

    ``counts`` are (unit, group, contribution to K sums) and are added up; ``statistic`` maps an array (..., G, K) of
    sums, the groups in their order, to (...).
    """
    totals: dict[str, list[float]] = {}
    for unit, group, contribution in counts:
        row = totals.setdefault(unit, [0.0] * (len(contribution) * len(groups)))
        first = len(contribution) * groups.index(group)
        for offset, count in enumerate(contribution):
            row[first + offset] += count
    return bootstrap(metric, totals, lambda t: statistic(t.reshape(*t.shape[:-1], len(groups), -1)), value)


class Difference(MetricEstimate):
    """The difference of two mean verdicts with its 95 % interval."""

    @property
    def within_noise(self) -> bool:
        """Whether the interval contains zero: the difference is not significant."""
        return self.low <= 0 <= self.high

    def as_json(self) -> dict[str, Any]:
        """As stored in a comparison."""
        ci95 = [self.low, self.high]
        return {"difference": self.value, "ci95": ci95, "units": self.units, "within_noise": self.within_noise}


def paired_difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> Difference:
    """Mean of the verdicts ``ours`` minus that of ``theirs``, records of two ``per_item.jsonl``.

    Units (a circular question, an image) are drawn with replacement, each with the verdicts of both, so that the
    difficulty of questions cancels. Verdicts are the items' ``score``; where a headline is not their mean (an F1), this
    is still the difference of the means. Raises DataError when the two are not about the same questions.
    """
    names = [[(str(record["question_id"]), record["unit"]) for record in records] for records in (ours, theirs)]
    if names[0] != names[1]:
        raise DataError("two checkpoints can be paired only on the same questions; score both again")
    totals: dict[str, list[float]] = {}
    for mine, other in zip(ours, theirs, strict=True):
        entry = totals.setdefault(mine["unit"], [0.0, 0.0])
        entry[0] += mine["score"] - other["score"]
        entry[1] += 1
    if not totals:
        return Difference("difference", 0.0, 0.0, 0.0, 0, "none")
    value = sum(entry[0] for entry in totals.values()) / len(ours)
    return Difference(**vars(bootstrap("difference", totals, lambda sums: sums[..., 0] / sums[..., 1], value)))
