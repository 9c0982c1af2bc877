"""Change of routing from checkpoint to checkpoint, and its saturation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpipe.analysis.base import Layer, MetricFamily, MetricInput, Row, axes, by, read_layer, where


def slot_change(before_TK: NDArray[Any], after_TK: NDArray[Any], times_T: NDArray[Any]) -> float:
    """Mean over tokens of the share of the k ranks whose expert differs: sensitive to the order of the
    choices (LibMoE 2.0's change rate)."""
    return float(np.average((before_TK != after_TK).mean(1), weights=times_T))


def set_change(before_TK: NDArray[Any], after_TK: NDArray[Any], times_T: NDArray[Any]) -> float:
    """Mean over tokens of ``1 - |S intersect S'| / k`` of the sets of chosen experts, whatever their order
    (OLMoE's). One minus it against the last checkpoint is the saturation."""
    kept_T = (before_TK[:, :, None] == after_TK[:, None, :]).any(2).mean(1)
    return float(np.average(1 - kept_T, weights=times_T))


def any_change(before_TK: NDArray[Any], after_TK: NDArray[Any], times_T: NDArray[Any]) -> float:
    """Share of tokens whose ordered choice differs at all (LibMoE 1.1's change rate)."""
    return float(np.average((before_TK != after_TK).any(1), weights=times_T))


def matched(a: Layer, b: Layer) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows of two layers that are the same token of the same question: generated tokens, which differ
    from checkpoint to checkpoint, and tokens in only one of the two logs are left out."""
    from mmpipe.analysis.expert_log import GENERATED

    def keys(layer: Layer) -> NDArray[Any]:
        longest = 1 << 24
        key = (layer.question_T.astype(np.int64) * longest + layer.position_T) * 16 + layer.scale_T
        return np.where(layer.kind_T == GENERATED, -1 - np.arange(len(key)), key)

    keys_a, keys_b = keys(a), keys(b)
    _, rows_a, rows_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    prompt = keys_a[rows_a] >= 0
    return rows_a[prompt], rows_b[prompt]


class Change(MetricFamily):
    """How many of a token's experts differ from the checkpoint before (change), and how many are those of the last
    checkpoint already (saturation), over the logged checkpoints on a recipe's path, as a mean over the layers."""

    reads = "logs of the path"
    least_inputs = 2
    title = "Change and saturation"

    def table(self, sources: Sequence[MetricInput]) -> list[Row]:
        from mmpipe.analysis.expert_log import places

        rows = []
        for place in places(sources[-1].path):
            last = read_layer(sources[-1].path, place)
            before: tuple[Layer, str] | None = None
            for source in sources:
                now = read_layer(source.path, place)
                if now is None or last is None or now.indices_TK.shape[1] != last.indices_TK.shape[1]:
                    before = None
                    continue
                here, there = matched(now, last)
                saturation = 1 - set_change(now.indices_TK[here], last.indices_TK[there], last.times_T[there])
                row: Row = {"part": place.part, "layer": place.layer, "checkpoint": source.checkpoint}
                row |= dict.fromkeys(("before", "tokens", "slot_change", "set_change", "any_change"), "")
                row |= {"saturation": saturation}
                if before is not None:
                    old, new = matched(before[0], now)
                    pair = (before[0].indices_TK[old], now.indices_TK[new], now.times_T[new])
                    row |= {
                        "before": before[1],
                        "tokens": int(pair[2].sum()),
                        "slot_change": slot_change(*pair),
                        "set_change": set_change(*pair),
                        "any_change": any_change(*pair),
                    }
                rows.append(row)
                before = (now, source.checkpoint)
        return rows

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        shown = {"set_change": "experts changed since the checkpoint before", "saturation": "experts of the last"}
        with axes(path, len(shown), width=5.0, columns=2) as panels:
            for axis, (value, title) in zip(panels, shown.items(), strict=True):
                for part, some in by(rows, "part").items():
                    stages = by([row for row in some if row[value] != ""], "checkpoint")
                    means = [float(np.mean([row[value] for row in cells])) for cells in stages.values()]
                    axis.plot(list(stages), means, marker="o", markersize=4, label=where(part, "").strip())
                axis.set(title=title, ylim=(0, 1.03))
                axis.tick_params(axis="x", labelrotation=20)
            panels[0].legend()


FAMILY = Change()
