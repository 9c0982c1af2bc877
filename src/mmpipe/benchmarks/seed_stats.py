"""Mean and spread of a comparison's rows that differ only in the seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any


def by_seed(rows: Iterable[Mapping[str, Any]], family: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row for every family with two checkpoints or more, in the order of ``rows``.

    ``family`` gives the family of a row's ``checkpoint`` (see ``Plan.family``); a checkpoint without one is left
    out. ``score`` is the mean of the scores, ``sd`` their sample standard deviation (divisor: seeds - 1), ``low``
    and ``high`` the worst and the best seed. The spread is that of training; each score's own interval, over the
    questions, is in its row.
    """
    families: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
    for row in rows:
        name = family.get(row["checkpoint"], row["checkpoint"])
        families.setdefault((name, row["control"]), []).append(row)
    return [_mean(name, members) for (name, _), members in families.items() if len(members) > 1]


def _mean(name: str, members: list[Mapping[str, Any]]) -> dict[str, Any]:
    scores = [member["score"] for member in members]
    return {
        "checkpoint": name,
        "seeds": len(scores),
        "score": statistics.fmean(scores),
        "sd": statistics.stdev(scores),
        "low": min(scores),
        "high": max(scores),
        "control": members[0]["control"],
        "of": [member["checkpoint"] for member in members],
    }
