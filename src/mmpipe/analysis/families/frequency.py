"""Selection frequency of experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpipe.analysis.base import Layer, MetricFamily, MetricInput, Row, axes, by, read_layers, where


def selection_counts(
    indices_TK: NDArray[Any], done_TK: NDArray[Any], times_T: NDArray[Any], experts: int
) -> NDArray[np.int64]:
    """How often each of ``experts`` is chosen, ``[N]``, over all k choices of all tokens.

    A token that was computed for several questions counts as often (``times_T``); choices that do nothing
    (``done_TK`` false) are left out. LibMoE's share is this over its sum.
    """
    times_TK = np.broadcast_to(times_T[:, None], indices_TK.shape)
    counts = np.bincount(indices_TK[done_TK], weights=times_TK[done_TK], minlength=experts)
    return counts.astype(np.int64)


def counts_of(layer: Layer, chosen_T: NDArray[Any] | None = None) -> NDArray[np.int64]:
    """Selection counts of a layer, of some of its tokens if given."""
    some = slice(None) if chosen_T is None else chosen_T
    return selection_counts(layer.indices_TK[some], layer.done_TK[some], layer.times_T[some], layer.experts)


def share_rows(place: Row, counts_N: NDArray[Any]) -> list[Row]:
    """One row an expert: the columns of ``place``, its count, and its share of all choices."""
    total = max(1, counts_N.sum())
    return [place | {"expert": n, "count": count, "share": count / total} for n, count in enumerate(counts_N.tolist())]


class Frequency(MetricFamily):
    """The share of all choices that goes to each expert, per layer; 1/N everywhere is perfect balance."""

    title = "Selection frequency"

    def table(self, sources: Sequence[MetricInput]) -> list[Row]:
        return [row for layer in read_layers(sources[0].path) for row in share_rows(layer.place, counts_of(layer))]

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        parts = by(rows, "part")
        with axes(path, len(parts)) as panels:
            for axis, (part, some) in zip(panels, parts.items(), strict=False):
                layers = by(some, "layer")
                shares = np.full((max(map(len, layers.values())), len(layers)), np.nan)
                for column, cells in enumerate(layers.values()):
                    shares[: len(cells), column] = [row["share"] for row in cells]
                image = axis.imshow(shares, aspect="auto", cmap="cividis", vmin=0)
                axis.set_xticks(range(len(layers)), list(layers))
                axis.set_yticks(range(len(shares)))
                axis.set(xlabel="layer", ylabel="expert", title=where(part, "").strip())
                axis.figure.colorbar(image, ax=axis, label="share of choices")


FAMILY = Frequency()
