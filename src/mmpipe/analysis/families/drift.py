"""Drift of router weights from checkpoint to checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpipe.analysis.base import MetricFamily, MetricInput, Row, axes, by, where


def relative_change(before_ND: NDArray[Any], after_ND: NDArray[Any]) -> float:
    """Frobenius norm of the difference over that of the weights before."""
    return float(np.linalg.norm(after_ND - before_ND) / max(float(np.linalg.norm(before_ND)), 1e-12))


def row_cosine(before_ND: NDArray[Any], after_ND: NDArray[Any]) -> float:
    """Mean cosine between each expert's row before and after: 1 when no direction has changed."""
    lengths = np.linalg.norm(before_ND, axis=-1) * np.linalg.norm(after_ND, axis=-1)
    return float(((before_ND * after_ND).sum(-1) / np.maximum(lengths, 1e-12)).mean())


class Drift(MetricFamily):
    """Relative change of the router's weights since the checkpoint before, and the mean cosine between the experts'
    rows, for the sparse checkpoints on the recipe's path. Tensors of a router that are no matrix are left out."""

    reads = "models of the path"
    least_inputs = 2
    per = "checkpoint"
    title = "Drift of router weights"

    def table(self, sources: Sequence[MetricInput]) -> list[Row]:
        from mmpipe.models.moe.hf import router_tensors

        rows = []
        before: dict[Any, NDArray[Any]] = {}
        for source, last in zip(sources, [None, *sources], strict=False):
            now = router_tensors(source.path.parent)
            for (place, name), weights in now.items():
                old = before.get((place, name))
                if old is not None and old.shape == weights.shape and weights.ndim == 2 and last:
                    rows.append(
                        {"part": place.part, "layer": place.layer, "tensor": name}
                        | {"before": last.checkpoint, "checkpoint": source.checkpoint}
                        | {"relative_change": relative_change(old, weights), "cosine": row_cosine(old, weights)}
                    )
            before = now
        return rows

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        shown = {"relative_change": "change / weights before", "cosine": "cosine of the experts' rows"}
        with axes(path, len(shown), width=4.6, columns=2) as panels:
            for axis, (value, title) in zip(panels, shown.items(), strict=True):
                for (part, name, checkpoint), some in by(rows, "part", "tensor", "checkpoint").items():
                    label = " ".join(
                        filter(None, (where(part, "").strip(), checkpoint, "" if name == "weight" else name))
                    )
                    layers = [row["layer"] for row in some]
                    axis.plot(layers, [row[value] for row in some], marker="o", markersize=3, label=label)
                axis.set(title=title, xlabel="layer")
                axis.xaxis.get_major_locator().set_params(integer=True)
            panels[0].legend(fontsize=7)


FAMILY = Drift()
