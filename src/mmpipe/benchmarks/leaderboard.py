"""All chosen checkpoints on all benchmarks in one table: means over seeds, ranks, and significance of differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mmpipe.benchmarks.seed_stats import by_seed
from mmpipe.benchmarks.stats import paired_difference

Scores = Mapping[str, Mapping[str, Any]]
"""The contents of ``score.json`` by checkpoint."""
Items = Mapping[str, Sequence[Mapping[str, Any]]]
"""The records of ``per_item.jsonl`` by checkpoint."""
Cell = dict[str, Any]


def leaderboard(scores: Mapping[str, Scores], items: Mapping[str, Items], family: Mapping[str, str]) -> dict[str, Any]:
    """One row per family of checkpoints that differ only in their seed, one cell per benchmark.

    ``scores`` and ``items`` are by benchmark, then by checkpoint; a checkpoint that a benchmark lacks has an empty cell
    there and moves no other. A cell holds the mean headline score, its deviation over seeds, the rank on that benchmark
    (equal scores share the mean of their ranks), and how it compares with the best (:func:`against`). A row's
    ``mean_rank`` is over its own cells, its ``mean`` over the benchmarks that all rows have.
    """
    columns = {name: _column(scores[name], items[name], family) for name in scores}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    shared = [name for name, column in columns.items() if len(column) == len(names)]
    rows = []
    for name in names:
        cells = {benchmark: column.get(name) for benchmark, column in columns.items()}
        ranks = [cell["rank"] for cell in cells.values() if cell]
        mean = statistics.fmean(columns[benchmark][name]["score"] for benchmark in shared) if shared else None
        summary = {"mean": mean, "mean_rank": statistics.fmean(ranks), "benchmarks": len(ranks)}
        rows.append({"checkpoint": name, "cells": cells, **summary})
    return {"benchmarks": list(columns), "mean_over": shared, "rows": rows}


def _column(scores: Scores, items: Items, family: Mapping[str, str]) -> dict[str, Cell]:
    rows = [
        {"checkpoint": name, "score": score["headline"]["value"], "control": False} for name, score in scores.items()
    ]
    many = {row["checkpoint"]: row for row in by_seed(rows, family)}
    cells: dict[str, Cell] = {}
    for row in rows:
        name = family.get(row["checkpoint"], row["checkpoint"])
        name = name if name in many else row["checkpoint"]
        found = many.get(name, {"score": row["score"], "sd": None, "seeds": 1, "of": [row["checkpoint"]]})
        cells[name] = {key: found[key] for key in ("score", "sd", "seeds", "of")}
    ordered = ranks({name: cell["score"] for name, cell in cells.items()})
    best = max(cells, key=lambda name: cells[name]["score"]) if cells else ""
    for name, cell in cells.items():
        cell["rank"] = ordered[name]
        cell["against_best"] = None if name == best else against(cell, cells[best], items) | {"best": best}
    return cells


def ranks(scores: Mapping[str, float]) -> dict[str, float]:
    """1 for the highest score; equal scores share the mean of the places they take."""
    values = list(scores.values())
    return {
        name: 1 + sum(v > score for v in values) + (sum(v == score for v in values) - 1) / 2
        for name, score in scores.items()
    }


def against(cell: Cell, best: Cell, items: Items) -> dict[str, Any]:
    """The difference of the mean verdicts to the best's, with a paired bootstrap over the benchmark's units, the
    verdicts of several seeds averaged question by question.

    ``within_noise`` when that interval holds zero, or when the headlines differ by less than two standard errors of the
    means over seeds (where both have several): with other questions or seeds, their order might be reversed.
    """
    found = paired_difference(_averaged(cell, items), _averaged(best, items))
    noise = found.within_noise
    if cell["sd"] is not None and best["sd"] is not None:
        error = math.sqrt(cell["sd"] ** 2 / cell["seeds"] + best["sd"] ** 2 / best["seeds"])
        noise = noise or abs(cell["score"] - best["score"]) < 2 * error
    return found.as_json() | {"within_noise": noise}


def _averaged(cell: Cell, items: Items) -> list[dict[str, Any]]:
    """One record a question: the mean verdict over the checkpoints of a cell."""
    runs = [items[name] for name in cell["of"]]
    return [
        {**records[0], "score": statistics.fmean(record["score"] for record in records)}
        for records in zip(*runs, strict=True)
    ]


def as_table(board: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells one below the other, for a spreadsheet."""
    rows = []
    for row in board["rows"]:
        for benchmark, cell in row["cells"].items():
            found = cell or {}
            best = found.get("against_best") or {}
            rows.append(
                {
                    "checkpoint": row["checkpoint"],
                    "benchmark": benchmark,
                    **{key: found.get(key, "") for key in ("score", "sd", "seeds", "rank")},
                    "difference_to_best": best.get("difference", ""),
                    "low": best["ci95"][0] if best else "",
                    "high": best["ci95"][1] if best else "",
                    "within_noise": best.get("within_noise", ""),
                    "mean_rank": row["mean_rank"],
                }
            )
    return rows
