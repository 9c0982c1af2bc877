"""Specialisation of experts on benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpipe.analysis.base import MetricFamily, MetricInput, Row, read_layers
from mmpipe.analysis.families.frequency import counts_of
from mmpipe.analysis.families.modality import draw_groups, group_rows


class Benchmarks(MetricFamily):
    """The share of the choices on each benchmark that goes to each expert, and the divergence between the benchmarks
    (0: they are routed alike)."""

    reads = "logs of all benchmarks"
    least_inputs = 2
    per = "checkpoint"
    title = "Specialisation on benchmarks"

    def table(self, sources: Sequence[MetricInput]) -> list[Row]:
        counts: dict[tuple[str, int], dict[str, Any]] = {}
        for source in sources:
            for layer in read_layers(source.path):
                counts.setdefault((layer.part, layer.layer), {})[source.benchmark] = counts_of(layer)
        return [
            row
            for (part, number), of_benchmarks in counts.items()
            for row in group_rows({"part": part, "layer": number}, "benchmark", of_benchmarks)
        ]

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw_groups(rows, "benchmark", path)


FAMILY = Benchmarks()
