"""Whether two checkpoints differ on a benchmark: a paired bootstrap over its official units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmpipe.benchmarks.stats import bootstrap
from mmpipe.errors import DataError


@dataclass(frozen=True)
class Difference:
    """The difference of two mean verdicts with its 95 % interval."""

    value: float
    low: float
    high: float
    units: int

    @property
    def within_noise(self) -> bool:
        """Whether the interval holds zero: these answers do not tell the two apart."""
        return self.low <= 0 <= self.high

    def as_json(self) -> dict[str, Any]:
        """As stored in a comparison."""
        return {
            "difference": self.value,
            "ci95": [self.low, self.high],
            "units": self.units,
            "within_noise": self.within_noise,
        }


def paired_difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> Difference:
    """Mean of the verdicts ``ours`` minus that of ``theirs``, records of two ``per_item.jsonl``.

    Units (a circular question, an image) are drawn with replacement, each with the verdicts of both: what
    makes a question hard for both cancels. Verdicts are the items' ``score``; where a headline is no mean of
    them (an F1), this is the difference of the means all the same. Raises DataError when the two are not
    about the same questions.
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
        return Difference(0.0, 0.0, 0.0, 0)
    value = sum(entry[0] for entry in totals.values()) / len(ours)
    drawn = bootstrap("difference", totals, lambda sums: sums[..., 0] / sums[..., 1], value)
    return Difference(value, drawn.low, drawn.high, drawn.units)
