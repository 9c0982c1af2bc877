"""Co-activation of experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpipe.analysis.base import MetricFamily, MetricInput, Row, axes, by, read_layers, where

_MOST_PANELS = 12
_STRONGEST = 15


def coactivation(
    indices_TK: NDArray[Any], done_TK: NDArray[Any], times_T: NDArray[Any], experts: int
) -> NDArray[np.int64]:
    """``A^T A`` of the 0/1 matrix of tokens by experts, ``[N, N]``, diagonal zero: how many tokens choose
    both of two experts. An expert that a token chooses twice is no pair."""
    chosen_TN = np.zeros((len(indices_TK), experts), np.float64)
    rows = np.broadcast_to(np.arange(len(indices_TK))[:, None], indices_TK.shape)
    chosen_TN[rows[done_TK], indices_TK[done_TK]] = 1
    together_NN = chosen_TN.T @ (chosen_TN * times_T[:, None])
    np.fill_diagonal(together_NN, 0)
    return together_NN.astype(np.int64)


class Coactivation(MetricFamily):
    """The share of each expert's tokens that another expert gets, too (rows add up to k - 1). At most twelve layers,
    evenly chosen, and the fifteen most paired experts of each are drawn; the table has all."""

    title = "Co-activation"

    def table(self, sources: Sequence[MetricInput]) -> list[Row]:
        rows = []
        for layer in read_layers(sources[0].path):
            pairs = coactivation(layer.indices_TK, layer.done_TK, layer.times_T, layer.experts)
            k = max(1, layer.indices_TK.shape[1] - 1)
            for a, b in np.ndindex(pairs.shape):
                if a != b:
                    share = float(pairs[a, b] * k / max(1, pairs[a].sum()))
                    rows.append(layer.place | {"expert": a, "other": b, "tokens": int(pairs[a, b]), "share": share})
        return rows

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        layers = list(by(rows, "part", "layer").items())
        shown = layers[:: -(-len(layers) // _MOST_PANELS) or 1]
        with axes(path, len(shown), width=3.0, height=2.6, columns=4) as panels:
            for axis, ((part, layer), some) in zip(panels, shown, strict=False):
                experts = max(row["expert"] for row in some) + 1
                share = np.full((experts, experts), np.nan)
                for row in some:
                    share[row["expert"], row["other"]] = row["share"]
                strongest = np.sort(np.argsort(-np.nansum(share, axis=0), kind="stable")[:_STRONGEST])
                image = axis.imshow(share[np.ix_(strongest, strongest)], cmap="cividis", vmin=0)
                axis.set_xticks(range(len(strongest)), strongest)
                axis.set_yticks(range(len(strongest)), strongest)
                axis.set_title(where(part, layer))
                axis.figure.colorbar(image, ax=axis)


FAMILY = Coactivation()
