"""Load balance of a layer's experts, and collapse of its routing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpipe.analysis.base import MetricFamily, MetricInput, Row, axes, lines_by_layer, read_layers
from mmpipe.analysis.families.frequency import counts_of, selection_counts
from mmpipe.losses import COLLAPSE_ALARM


def selection_entropy(counts_N: NDArray[Any]) -> float:
    """Entropy in bits of the frequencies, ``-sum f log2 f``: log2 N when all are used alike, 0 when one is."""
    f_N = counts_N / max(1, counts_N.sum())
    used = f_N[f_N > 0]
    return float(-(used * np.log2(used)).sum())


def normalised_entropy(counts_N: NDArray[Any]) -> float:
    """The same over log2 N: between 0 and 1 for any number of experts (LibMoE takes first choices only)."""
    return selection_entropy(counts_N) / np.log2(max(2, len(counts_N)))


def load_ratio(counts_N: NDArray[Any]) -> float:
    """Load of the busiest expert over the mean load: 1 is even, N is one expert for all."""
    return float(counts_N.max() * len(counts_N) / max(1, counts_N.sum()))


def variation(counts_N: NDArray[Any]) -> float:
    """Standard deviation of the loads over their mean."""
    return float(counts_N.std() / max(counts_N.mean(), 1e-12))


def most_common_expert_set(indices_TK: NDArray[Any], times_T: NDArray[Any]) -> tuple[tuple[int, ...], float]:
    """The most common ordered choice of k experts, and its share of the tokens; a choice without effect is -1."""
    sets, of_T = np.unique(indices_TK, axis=0, return_inverse=True)
    tokens = np.bincount(of_T.ravel(), weights=times_T)
    best = int(tokens.argmax())
    return tuple(int(e) for e in sets[best]), float(tokens[best] / tokens.sum())


class Balance(MetricFamily):
    """Entropy of the selection frequencies (normalised), load of the busiest expert over the mean, and the share of
    tokens that make the most common choice of experts; above one half the layer has collapsed."""

    title = "Load balance and collapse"

    def table(self, sources: Sequence[MetricInput]) -> list[Row]:
        rows = []
        for layer in read_layers(sources[0].path):
            counts = counts_of(layer)
            first = selection_counts(layer.indices_TK[:, :1], layer.done_TK[:, :1], layer.times_T, layer.experts)
            experts, share = most_common_expert_set(np.where(layer.done_TK, layer.indices_TK, -1), layer.times_T)
            rows.append(
                layer.place
                | {
                    "tokens": int(layer.times_T.sum()),
                    "entropy_bits": selection_entropy(counts),
                    "entropy_normalised": float(normalised_entropy(counts)),
                    "first_choice_entropy_normalised": float(normalised_entropy(first)),
                    "busiest_over_mean": load_ratio(counts),
                    "variation": variation(counts),
                    "unused_experts": int((counts == 0).sum()),
                    "top_set": " ".join(map(str, experts)),
                    "top_set_share": share,
                    "collapsed": share > COLLAPSE_ALARM,
                }
            )
        return rows

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        shown = {
            "entropy_normalised": "entropy / maximum",
            "busiest_over_mean": "busiest expert / mean",
            "top_set_share": "most common choice, share of tokens",
        }
        with axes(path, len(shown)) as panels:
            for axis, (value, title) in zip(panels, shown.items(), strict=True):
                lines_by_layer(axis, rows, value)
                axis.set_title(title)
            panels[0].set_ylim(0, 1.03)
            panels[2].set_ylim(0, 1.03)
            panels[2].axhline(COLLAPSE_ALARM, color="grey", linestyle=":", linewidth=1)
            for row in rows:
                if row["collapsed"]:
                    panels[2].annotate("collapsed", (row["layer"], row["top_set_share"]), color="#D55E00")
            panels[0].legend()


FAMILY = Balance()
