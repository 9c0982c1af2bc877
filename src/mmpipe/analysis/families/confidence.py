"""Concentration of a router's weights on the chosen experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpipe.analysis.base import MetricFamily, MetricInput, Row, axes, lines_by_layer, read_layers


def shares(weights_TK: NDArray[Any]) -> NDArray[Any]:
    """Weights of a token as shares of their sum, signs apart; zero where all are zero."""
    size_TK = np.abs(weights_TK)
    return size_TK / np.maximum(size_TK.sum(1, keepdims=True), 1e-12)


def weight_entropy(weights_TK: NDArray[Any], times_T: NDArray[Any]) -> float:
    """Mean over tokens of ``-sum q ln q`` in nats, q the shares of the k weights: ln k when they are all
    alike (LibMoE's ``entropy_weight_topk``, without the 1e-9 it adds to q)."""
    q_TK = shares(weights_TK)
    entropy_T = -(q_TK * np.log(np.where(q_TK > 0, q_TK, 1))).sum(1)
    return float(np.average(entropy_T, weights=times_T))


def margin(weights_TK: NDArray[Any], times_T: NDArray[Any]) -> float:
    """Mean over tokens of the largest share minus the second; 1 with one expert a token, where LibMoE's fails."""
    q_TK = np.sort(shares(weights_TK), axis=1)
    if q_TK.shape[1] == 1:
        return 1.0
    return float(np.average(q_TK[:, -1] - q_TK[:, -2], weights=times_T))


def first_share(weights_TK: NDArray[Any], times_T: NDArray[Any]) -> float:
    """Mean share of the first choice."""
    return float(np.average(shares(weights_TK)[:, 0], weights=times_T))


class Confidence(MetricFamily):
    """Margin between the two largest weights of a token, and entropy of its weights over the largest possible (ln k).
    A margin near 0 at an entropy near 1 means that the router averages its experts."""

    title = "Confidence"

    def table(self, sources: Sequence[MetricInput]) -> list[Row]:
        return [
            layer.place
            | {
                "margin": margin(layer.weights_TK, layer.times_T),
                "weight_entropy_nats": (entropy := weight_entropy(layer.weights_TK, layer.times_T)),
                "weight_entropy_normalised": entropy / np.log(max(2, layer.weights_TK.shape[1])),
                "first_share": first_share(layer.weights_TK, layer.times_T),
            }
            for layer in read_layers(sources[0].path)
        ]

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        shown = {"margin": "margin", "weight_entropy_normalised": "entropy of the weights / ln k"}
        with axes(path, len(shown)) as panels:
            for axis, (value, title) in zip(panels, shown.items(), strict=True):
                lines_by_layer(axis, rows, value)
                axis.set(title=title, ylim=(0, 1.03))
            panels[0].legend()


FAMILY = Confidence()
