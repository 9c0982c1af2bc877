"""Specialisation of experts on image tokens, prompt tokens, or generated tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpipe.analysis.base import Layer, MetricFamily, MetricInput, Row, axes, by, lines_by_layer, read_layers, where
from mmpipe.analysis.families.frequency import counts_of, share_rows


def divergence(counts_GN: NDArray[Any]) -> float:
    """Generalised Jensen-Shannon divergence in bits of the selection frequencies of G groups of tokens, each
    weighted equally: 0 when all groups use the experts alike, log2 G when they share none (Lin 1991)."""
    counts_GN = counts_GN[counts_GN.sum(1) > 0]
    if len(counts_GN) < 2:
        return 0.0
    f_GN = counts_GN / counts_GN.sum(1, keepdims=True)

    def bits(p: NDArray[Any]) -> NDArray[Any]:
        return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)

    return float(max(0.0, bits(f_GN.mean(0)) - bits(f_GN).mean()))


def groups_of(layer: Layer) -> dict[str, NDArray[Any]]:
    """Tokens by kind, and by the scale of the view where a tower has several."""
    from mmpipe.analysis.expert_log import KINDS

    scales = np.unique(layer.scale_T)
    groups = {}
    for code, kind in enumerate(KINDS):
        for scale in scales:
            chosen = (layer.kind_T == code) & (layer.scale_T == scale)
            if chosen.any():
                groups[kind if len(scales) == 1 else f"{kind}, scale {scale}"] = chosen
    return groups


def group_rows(place: Row, group: str, counts: Mapping[str, NDArray[Any]]) -> list[Row]:
    """The shares of every expert in each group of a layer's tokens, and the divergence between the groups."""
    bits = divergence(np.array(list(counts.values())))
    rows = (row for name, counts_N in counts.items() for row in share_rows(place | {group: name}, counts_N))
    return [row | {"divergence_bits": bits} for row in rows]


class Modality(MetricFamily):
    """The share of the choices of each kind of token that goes to each expert, and the divergence between the kinds
    (0: no specialisation). Views of a multi-scale tower are kinds of their own."""

    title = "Specialisation on modalities"

    def table(self, sources: Sequence[MetricInput]) -> list[Row]:
        rows = []
        for layer in read_layers(sources[0].path):
            counts = {name: counts_of(layer, chosen) for name, chosen in groups_of(layer).items()}
            rows += group_rows(layer.place, "kind", counts)
        return rows

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw_groups(rows, "kind", path)


def draw_groups(rows: Sequence[Row], group: str, path: Path) -> None:
    """The divergence over the layers, and the shares of the groups in the layer where they differ most."""
    layers = by(rows, "part", "layer")
    most = max(layers.values(), key=lambda some: some[0]["divergence_bits"])
    with axes(path, 2, width=4.6, columns=2) as (over_layers, shares):
        lines_by_layer(over_layers, [some[0] for some in layers.values()], "divergence_bits")
        over_layers.set(title=f"divergence between each {group} (bits)", ylim=(0, None))
        over_layers.legend()
        groups = by(most, group)
        width = 0.8 / len(groups)
        for number, (name, some) in enumerate(groups.items()):
            at = [row["expert"] - 0.4 + width * (number + 0.5) for row in some]
            shares.bar(at, [row["share"] for row in some], width, label=name)
        shares.set(title=where(most[0]["part"], most[0]["layer"]), xlabel="expert", ylabel="share of choices")
        shares.set_xticks(range(len(next(iter(groups.values())))))
        shares.legend(fontsize=7)


FAMILY = Modality()
