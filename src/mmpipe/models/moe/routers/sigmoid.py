"""Sigmoid scores: experts do not compete for probability, the k best are chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmpipe.models.moe.routers.base import LinearRouter, Routing, linear_float, rescaled, routed


class SigmoidRouter(LinearRouter):
    """``s = sigmoid(W x)``, the k best, weights ``s / sum of the chosen s``; balance on ``softmax(W x)``.

    That is sigma-MoE in LibMoE's current code. ``reference`` is Sigmoid-R of the version its first tables come from:
    ``p = softmax(sigmoid(W x + b))``, the k best, ``p / sum of the chosen p``; weights there are all close to 1/k.
    """

    def __init__(self, width: int, experts: int, top_k: int, settings: Any) -> None:
        super().__init__(width, experts, top_k, settings)
        self.bias = nn.Parameter(torch.empty(experts)) if self.reference else None

    def forward(self, hidden_TD: Tensor, sequence_T: Tensor | None = None) -> Routing:
        logits_TN = linear_float(hidden_TD, self.weight, self.bias)
        scores_TN = logits_TN.sigmoid()
        if self.reference:
            logits_TN, scores_TN = scores_TN, scores_TN.softmax(1)
        best_TK, indices_TK = scores_TN.topk(self.top_k, dim=1)
        return routed(
            indices_TK, rescaled(best_TK), p_TN=logits_TN.softmax(1), logits_TN=logits_TN, sequence_T=sequence_T
        )
