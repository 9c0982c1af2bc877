"""TC-MoE: an expert may be added, subtracted or left out (Yan et al. 2025, ternary choice)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpipe.models.moe.routers.base import BaseRouter, Routing, linear_float, uniform_
from mmpipe.objectives import routing

_NEGATIVE_BIAS, _NULL_BIAS = -1.0, -10.0
_NULL_REWARD = 1e-5


class Router(BaseRouter):
    """2N + K scores: N to add an expert, N to subtract it, K to do nothing; the k best of their softmax.

    Weights are ``p / (chosen p that do something + all p that do nothing)``, with the sign. The balance loss
    is over the N experts, each with both of its scores. ``null`` rewards doing nothing (1e-5 of its mean
    probability).

    An expert chosen twice (added and subtracted) counts twice. LibMoE's code loses one of the two, and its
    balance loss grows with the batch; neither is reproduced.
    """

    NORMALISED: ClassVar[bool] = False

    def __init__(self, width: int, experts: int, top_k: int, settings: Any) -> None:
        super().__init__(width, experts, top_k, settings)
        self.weight = nn.Parameter(torch.empty(2 * experts + top_k, width))

    def reset_parameters(self, generator: torch.Generator) -> None:
        uniform_(self, self.width**-0.5, generator)

    def forward(self, hidden_TD: Tensor, sequence_T: Tensor | None = None) -> Routing:
        n = self.experts
        raw_TM = linear_float(hidden_TD, self.weight)
        bias_M = raw_TM.new_zeros(raw_TM.shape[1])
        bias_M[n : 2 * n], bias_M[2 * n :] = _NEGATIVE_BIAS, _NULL_BIAS
        logits_TM = raw_TM + bias_M
        p_TM = logits_TM.softmax(1)
        best_TK, choice_TK = p_TM.topk(self.top_k, dim=1)
        acts_TK = choice_TK < 2 * n
        nothing_T1 = p_TM[:, 2 * n :].sum(1, keepdim=True)
        total_T1 = (best_TK * acts_TK).sum(1, keepdim=True) + nothing_T1
        sign_TK = torch.where(choice_TK < n, 1.0, -1.0) * acts_TK
        weights_TK = sign_TK * best_TK / total_T1.clamp_min(1e-6)
        indices_TK = torch.where(acts_TK, choice_TK % n, 0)

        pair_TN = p_TM[:, :n] + p_TM[:, n : 2 * n]
        share_TN = pair_TN / pair_TN.sum(1, keepdim=True)
        return Routing(
            indices_TK,
            weights_TK,
            losses={
                "balance": routing.load_balancing_loss(share_TN, indices_TK[:, 0], sequence_T),
                "z": routing.z_loss(logits_TM),
                "null": -_NULL_REWARD * routing.mean_over_tokens(nothing_T1.squeeze(1)),
            },
            statistics={
                "entropy": routing.entropy(p_TM.detach()),
                "margin": routing.margin(weights_TK.detach().abs()),
                "null": (~acts_TK).float().mean(),
            },
        )
