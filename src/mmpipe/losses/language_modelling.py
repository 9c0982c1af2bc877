"""Cross entropy of the supervised tokens, from hidden states and the output head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmpipe.losses import positions
from mmpipe.losses.head import CHUNK_BYTES, sum_over_rows


def language_modelling_loss(
    hidden_BLD: Tensor,
    weight_VD: Tensor,
    labels_BL: Tensor,
    *,
    denominator: Tensor | float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Summed cross entropy (nats) of the tokens whose label is not -100, divided by ``denominator``.

    ``denominator`` defaults to the number of supervised tokens (a mean); a trainer gives the count of the global batch. The
    head is applied to rows that predict a supervised token only. Without any, the loss is zero, with zero gradients.
    """
    rows_R, targets_R = positions.response(labels_BL)

    def values(logits_CV: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return F.cross_entropy(logits_CV, targets_R[rows], reduction="none"), {}

    hidden_RD = hidden_BLD.flatten(0, 1)[rows_R]
    total, _ = sum_over_rows(hidden_RD, weight_VD, values, chunk_bytes=chunk_bytes)
    return total / (max(1, len(rows_R)) if denominator is None else denominator)
