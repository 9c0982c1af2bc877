"""The comparison of several checkpoints on one benchmark: the content of ``results/{benchmark}.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmpipe.benchmarks.seed_stats import by_seed
from mmpipe.errors import DataError


def compare(
    benchmark: str,
    scores: Mapping[str, Mapping[str, Any]],
    controls: Mapping[str, Mapping[str, Any]] | None = None,
    chance: float | None = None,
    family: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One row a checkpoint, in the order given, from the contents of their ``score.json``.

    ``controls`` are rows measured under a control (e.g. images exchanged between questions), marked as such; ``chance``
    is the score of guessing; ``family`` gives the common name of checkpoints that differ only in their seed, whose
    means and spreads are under ``seeds``. Scores of different protocols or of different question sets are different
    measurements. Raises DataError when the rows are not of one benchmark, protocol and number of questions.
    """
    rows = [_row(name, score) for name, score in scores.items()]
    rows += [_row(name, score) | {"control": True} for name, score in (controls or {}).items()]
    for name in ("task", "protocol", "n"):
        found = sorted({str(row[name]) for row in rows})
        if len(found) > 1:
            raise DataError(f"{benchmark}: scores of different {name} cannot stand in one table: {', '.join(found)}")
    best = max((row for row in rows if not row["control"]), key=lambda row: row["score"], default=None)
    first = rows[0] if rows else {}
    return {
        "benchmark": benchmark,
        **{name: first.get(name) for name in ("task", "protocol", "metric")},
        "n": first.get("n", 0),
        "chance": chance,
        "best": best["checkpoint"] if best else None,
        "seeds": by_seed(rows, family or {}),
        "rows": rows,
    }


def _row(checkpoint: str, score: Mapping[str, Any]) -> dict[str, Any]:
    headline = score["headline"]
    return {
        "checkpoint": checkpoint,
        "task": score["benchmark"],
        "protocol": score["protocol"],
        "metric": headline["metric"],
        "score": headline["value"],
        **{name: headline[name] for name in ("ci95", "units")},
        **{name: score[name] for name in ("n", "missing", "unparsed")},
        "control": False,
        "lineage": score.get("lineage", {}),
    }
