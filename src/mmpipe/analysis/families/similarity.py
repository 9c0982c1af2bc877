"""Similarity of the outputs of the experts that a token is routed to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpipe.analysis.base import MetricFamily, MetricInput, Row, axes, lines_by_layer

if TYPE_CHECKING:
    from torch import Tensor


def pairwise_cosine(outputs_TKD: Tensor) -> Tensor:
    """Mean cosine between the outputs of different experts of a token, a scalar: 1 when experts are copies,
    0 when they are orthogonal."""
    k = outputs_TKD.shape[1]
    cosine_TKK = _cosines(outputs_TKD)
    own = cosine_TKK.diagonal(dim1=1, dim2=2).sum()
    return (cosine_TKK.sum() - own) / max(1, len(outputs_TKD) * k * (k - 1))


def reference_diversity(outputs_TKD: Tensor) -> Tensor:
    """LibMoE's ``experts_diversity_loss``: mean over all k x k entries of the positive part of the cosines,
    the diagonal set to zero but counted, so that copies give 1 - 1/k."""
    k = outputs_TKD.shape[1]
    cosine_TKK = _cosines(outputs_TKD).relu()
    own = cosine_TKK.diagonal(dim1=1, dim2=2).sum()
    return (cosine_TKK.sum() - own) / max(1, len(outputs_TKD) * k * k)


def _cosines(outputs_TKD: Tensor) -> Tensor:
    import torch.nn.functional as F

    unit_TKD = F.normalize(outputs_TKD.float(), dim=-1)
    return unit_TKD @ unit_TKD.transpose(1, 2)


class Similarity(MetricFamily):
    """Mean cosine between the outputs of the experts a token is sent to, measured on the prompts of some questions
    spread over the benchmark: experts that are still copies of one network have 1."""

    reads = "model and questions"
    runs_model = True
    title = "Similarity of expert outputs"

    def measure(self, sources: Sequence[MetricInput], device: str, questions: int) -> list[Row]:
        from mmpipe.analysis.expert_outputs import expert_outputs

        sums: dict[Any, list[float]] = {}
        checkpoint, prepared = (source.path.parent for source in sources[:2])
        for place, outputs_TKD in expert_outputs(checkpoint, prepared, device, questions):
            tokens = len(outputs_TKD)
            totals = sums.setdefault(place, [0.0, 0.0, 0.0])
            totals[0] += tokens
            totals[1] += tokens * float(pairwise_cosine(outputs_TKD))
            totals[2] += tokens * float(reference_diversity(outputs_TKD))
        return [
            {"part": place.part, "layer": place.layer, "tokens": int(tokens)}
            | {"cosine": cosine / tokens, "libmoe_diversity": reference / tokens}
            for place, (tokens, cosine, reference) in sorted(sums.items())
        ]

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        with axes(path, 1, width=4.6) as (axis,):
            lines_by_layer(axis, rows, "cosine")
            axis.set(title="cosine between outputs of a token's experts", ylim=(None, 1.03))
            axis.legend()


FAMILY = Similarity()
