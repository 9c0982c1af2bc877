"""A shared expert: every token uses the last expert, the others are routed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmpipe.errors import ConfigError
from mmpipe.models.moe.routers.base import LinearRouter, Routing, linear_float, rescaled, routed
from mmpipe.models.moe.spec import RouterSettings


class SharedExpertSettings(RouterSettings):
    """Settings of :class:`SharedExpertRouter`."""

    scores: Literal["softmax", "sigmoid"] = "softmax"


class SharedExpertRouter(LinearRouter):
    """Half the weight for the last expert, half for the k - 1 best of the others.

    With ``softmax`` scores that is LibMoE's SharedE-V2, with ``sigmoid`` its SharedE-V3. ``top_k`` counts the
    shared expert. Losses and measurements are those of the routed experts.
    """

    Settings = SharedExpertSettings

    STARTS_ALIKE: ClassVar[bool] = True

    def __init__(self, width: int, experts: int, top_k: int, settings: Any) -> None:
        super().__init__(width, experts, top_k, settings)
        if top_k < 2:
            raise ConfigError("router 'shared': top_k counts the shared expert and must be 2 or more")

    def rows(self) -> int:
        return self.experts - 1

    def forward(self, hidden_TD: Tensor, sequence_T: Tensor | None = None) -> Routing:
        logits_TN = linear_float(hidden_TD, self.weight)
        p_TN = logits_TN.softmax(1)
        scores_TN = p_TN if self.settings.scores == "softmax" else logits_TN.sigmoid()
        best_TK, indices_TK = scores_TN.topk(self.top_k - 1, dim=1)
        of_routed = routed(indices_TK, rescaled(best_TK), p_TN=p_TN, logits_TN=logits_TN, sequence_T=sequence_T)
        shared_T1 = torch.full_like(indices_TK[:, :1], self.experts - 1)
        half_T1 = torch.full_like(best_TK[:, :1], 0.5)
        return replace(
            of_routed,
            indices_TK=torch.cat([indices_TK, shared_T1], 1),
            weights_TK=torch.cat([0.5 * of_routed.weights_TK, half_T1], 1),
        )
