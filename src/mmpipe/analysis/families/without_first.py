"""Loss of score when each token's first expert is left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmpipe.analysis.base import MetricFamily, MetricInput, Row, axes
from mmpipe.artifacts.files import read_json, read_jsonl
from mmpipe.benchmarks.stats import paired_difference


class WithoutFirst(MetricFamily):
    """The score without each token's first choice of expert (the others are rescaled) against the score with it, both
    generated. The interval is a paired bootstrap over the benchmark's units of the mean verdict."""

    reads = "scores with and without the first expert"
    per = "checkpoint"
    title = "Without the first expert"

    def table(self, sources: Sequence[MetricInput]) -> list[Row]:
        rows = []
        for score, items, other_score, other_items in zip(*(sources[i::4] for i in range(4)), strict=True):
            whole, left = read_json(score.path)["headline"], read_json(other_score.path)["headline"]
            pair = paired_difference(read_jsonl(other_items.path), read_jsonl(items.path))
            rows.append(
                {
                    "benchmark": score.benchmark,
                    "metric": whole["metric"],
                    "score": float(whole["value"]),
                    "without_first": float(left["value"]),
                    "change": float(left["value"] - whole["value"]),
                    "mean_verdict_change": pair.value,
                    "low": pair.low,
                    "high": pair.high,
                    "within_noise": pair.within_noise,
                }
            )
        return rows

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        with axes(path, 1, width=5.0, height=1.2 + 0.4 * len(rows)) as (axis,):
            for place, row in enumerate(rows):
                value = row["mean_verdict_change"]
                colour = "grey" if row["within_noise"] else "#D55E00"
                spread = [[value - row["low"]], [row["high"] - value]]
                axis.errorbar([value], [place], xerr=spread, fmt="o", color=colour, capsize=3)
            axis.axvline(0, color="grey", linewidth=0.8)
            axis.set_yticks(range(len(rows)), [row["benchmark"] for row in rows])
            axis.invert_yaxis()
            axis.set(title="without the first expert", xlabel="change of the mean verdict (grey: within noise)")


FAMILY = WithoutFirst()
