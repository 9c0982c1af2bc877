"""ReLU routing: an expert's weight is proportional to its positive score."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mmpipe.models.moe.routers.base import LinearRouter, Routing, linear_float, routed


class ReMoERouter(LinearRouter):
    """``s = relu(W x)``, the k largest, weights ``s / (sum of the chosen s + 1e-6)``.

    The form LibMoE ships. The published ReMoE (Wang et al. 2024) has no k: it takes every expert above zero and steers
    their number by an adaptive L1 term. A token with no score above zero passes through the residual stream only.
    """

    NORMALISED: ClassVar[bool] = False
    STARTS_ALIKE: ClassVar[bool] = True

    def forward(self, hidden_TD: Tensor, sequence_T: Tensor | None = None) -> Routing:
        logits_TN = linear_float(hidden_TD, self.weight)
        best_TK, indices_TK = logits_TN.relu().topk(self.top_k, dim=1)
        weights_TK = best_TK / (best_TK.sum(1, keepdim=True) + 1e-6)
        return routed(indices_TK, weights_TK, p_TN=logits_TN.softmax(1), logits_TN=logits_TN, sequence_T=sequence_T)
