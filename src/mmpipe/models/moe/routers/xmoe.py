"""X-MoE: tokens are compared with expert embeddings on a sphere of low dimension (Chi et al. 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmpipe.models.moe.routers.base import BaseRouter, Routing, linear_float, rescaled, routed
from mmpipe.models.moe.spec import RouterSettings


class XMoESettings(RouterSettings):
    """Settings of :class:`XMoERouter`."""

    dimension: int | None = Field(None, ge=1)
    """Of the sphere; half the number of experts by default."""
    temperature: float = Field(0.3, gt=0)
    final_temperature: float | None = Field(None, gt=0)
    """Temperature at the end of a linear schedule; None: constant."""
    radius: float = Field(1.5, gt=0)


class XMoERouter(BaseRouter):
    """``l_e = radius * (R x / |R x|) . (e / |e|)``, ``p = softmax(l / temperature)``, the k best, rescaled.

    ``reference`` is LibMoE's: weights are a second softmax over the k probabilities, which pulls them to 1/k; the
    z-loss is of l before the temperature; and embeddings are rescaled outside of the graph, so that their gradient keeps
    a part along the radius. (There they are also overwritten by every forward pass, which changes no result.)
    """

    Settings = XMoESettings

    STARTS_ALIKE: ClassVar[bool] = True

    def __init__(self, width: int, experts: int, top_k: int, settings: Any) -> None:
        super().__init__(width, experts, top_k, settings)
        dimension = settings.dimension or max(1, experts // 2)
        self.reduction = nn.Parameter(torch.empty(dimension, width))
        self.embeddings = nn.Parameter(torch.empty(experts, dimension))

    def forward(self, hidden_TD: Tensor, sequence_T: Tensor | None = None) -> Routing:
        reference = self.reference
        reduced_TM = F.normalize(linear_float(hidden_TD, self.reduction), dim=1, eps=1e-4)
        given_NM = self.embeddings.float()
        on_sphere_NM = self.settings.radius * F.normalize(given_NM, dim=1)
        if reference:
            on_sphere_NM = given_NM + (on_sphere_NM - given_NM).detach()
        cosines_TN = linear_float(reduced_TM, on_sphere_NM)
        first, last = self.settings.temperature, self.settings.final_temperature
        logits_TN = cosines_TN / self.scheduled(first, last or first)
        p_TN = logits_TN.softmax(1)
        best_TK, indices_TK = p_TN.topk(self.top_k, dim=1)
        weights_TK = best_TK.softmax(1) if reference else rescaled(best_TK)
        seen_TN = cosines_TN if reference else logits_TN
        return routed(indices_TK, weights_TK, p_TN=p_TN, logits_TN=seen_TN, sequence_T=sequence_T)
