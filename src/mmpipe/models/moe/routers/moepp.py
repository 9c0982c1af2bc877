"""MoE++: zero-computation experts besides the ordinary ones (Jin et al. 2024)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpipe.losses import routing
from mmpipe.models.moe.routers.base import LinearRouter, Routing, linear_float, rescaled, routed

_PENALISED, _PENALTY = 4, 0.3


class MoEPPRouter(LinearRouter):
    """Softmax top-k over the N experts, one that gives zero, and one that gives ``a_1 x + a_2 c``.

    ``a = softmax(V x)``, ``c`` is learned. Weights of the chosen are rescaled to one; what goes to the zero
    expert is left out. As in LibMoE's code there is no copy expert and no residual of the scores.

    ``reference``: the balance loss counts the entry of index 4 1.3 times. That was meant for the zero expert,
    which has this index among four experts only.
    """

    NORMALISED: ClassVar[bool] = False
    ADDS: ClassVar[bool] = True
    STARTS_ALIKE: ClassVar[bool] = True

    def __init__(self, width: int, experts: int, top_k: int, settings: Any) -> None:
        super().__init__(width, experts, top_k, settings)
        self.mixture = nn.Parameter(torch.empty(2, width))
        self.constant = nn.Parameter(torch.empty(width))

    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        with torch.no_grad():
            self.constant.normal_(std=0.002, generator=generator)

    def rows(self) -> int:
        return self.experts + 2

    def forward(self, hidden_TD: Tensor, sequence_T: Tensor | None = None) -> Routing:
        logits_TM = linear_float(hidden_TD, self.weight)
        p_TM = logits_TM.softmax(1)
        best_TK, choice_TK = p_TM.topk(self.top_k, dim=1)
        weights_TK = rescaled(best_TK)
        result = routed(choice_TK, weights_TK, p_TN=p_TM, logits_TN=logits_TM, sequence_T=sequence_T)
        losses = result.losses
        if self.reference and p_TM.shape[1] > _PENALISED:
            extra = _PENALTY * routing.load_balancing_term(p_TM, choice_TK[:, 0], _PENALISED, sequence_T)
            losses = losses | {"balance": losses["balance"] + extra}
        computes_TK = choice_TK < self.experts
        share_T2 = F.softmax(linear_float(hidden_TD, self.mixture), dim=1)
        constant_TD = share_T2[:, :1] * hidden_TD.float() + share_T2[:, 1:] * self.constant.float()
        weight_T1 = (weights_TK * (choice_TK == self.experts + 1)).sum(1, keepdim=True)
        return Routing(
            torch.where(computes_TK, choice_TK, 0),
            weights_TK * computes_TK,
            losses,
            result.statistics | {"free": (~computes_TK).float().mean()},
            addition_TD=weight_T1 * constant_TD,
        )
