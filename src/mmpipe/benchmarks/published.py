"""Published results (``config/published.yaml``), shown beside ours where the measurement is the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator

from mmpipe.settings import Settings


class Measure(Settings):
    """How a published column was measured, in the names of ``score.json``."""

    benchmark: str
    """The benchmark module, e.g. ``gqa``."""
    protocol: str
    """With the judge's name where there is one (``mmhal@gpt-4-0314``)."""
    metric: str
    questions: int = Field(ge=1)
    """Number of questions; another version of a benchmark is another measurement."""
    scale: float = Field(default=1.0, gt=0)
    """Turns the number as printed into ours, e.g. 0.01 for a share printed in percent."""


class PublishedTable(Settings):
    """One table of one publication."""

    system: str
    source: str = Field(pattern="^https?://")
    measures: dict[str, Measure]
    models: dict[str, dict[str, float]]
    """model -> column -> the number as printed."""

    @model_validator(mode="after")
    def _columns_are_measured(self) -> PublishedTable:
        for model, numbers in self.models.items():
            unknown = sorted(set(numbers) - set(self.measures))
            if unknown:
                raise ValueError(f"model '{model}': nothing in 'measures' says how {', '.join(unknown)} was measured")
        return self


def rows(tables: Mapping[str, PublishedTable], benchmark: str) -> list[dict[str, Any]]:
    """Every published figure of a benchmark, in our units, with how it was measured."""
    return [row for table in tables.values() for row in _rows(table) if row["task"] == benchmark]


def beside(comparison: Mapping[str, Any], published: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of ``published`` with the comparison's task, protocol, metric and questions."""
    same = ("task", "protocol", "metric", "n")
    return [row for row in published if all(row[name] == comparison[name] for name in same)]


def _rows(table: PublishedTable) -> Iterator[dict[str, Any]]:
    for model, numbers in table.models.items():
        for column, number in numbers.items():
            measure = table.measures[column]
            yield {
                "system": table.system,
                "model": model,
                "task": measure.benchmark,
                "protocol": measure.protocol,
                "metric": measure.metric,
                "n": measure.questions,
                "score": round(number * measure.scale, 6),
                "source": table.source,
            }
