"""Whether experts specialise on benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmpipe.analysis.base import MetricFamily, MetricInput, Row, read_layers
from mmpipe.analysis.families.frequency import counts_of
from mmpipe.analysis.families.modality import divergence, draw_groups


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
        rows = []
        for (part, number), of_benchmarks in counts.items():
            bits = divergence(np.array(list(of_benchmarks.values())))
            for name, counts_N in of_benchmarks.items():
                for expert, count in enumerate(counts_N.tolist()):
                    rows.append(
                        {"part": part, "layer": number, "benchmark": name, "expert": expert, "count": count}
                        | {"share": count / max(1, counts_N.sum()), "divergence_bits": bits}
                    )
        return rows

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw_groups(rows, "benchmark", path)


FAMILY = Benchmarks()
