"""Cosine scores: an expert is chosen by the angle between its embedding and the token, whatever their lengths."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mmpipe.models.moe.routers.base import LinearRouter, Routing, linear_float, rescaled, routed
from mmpipe.models.moe.spec import RouterSettings


class CosineSettings(RouterSettings):
    """Settings of :class:`CosineRouter`."""

    temperature: float = Field(0.1, gt=0)
    """Divides the cosines; not used by ``reference``."""
    final_temperature: float | None = Field(None, gt=0)
    """Temperature at the end of a linear schedule; None: constant."""
    perturbation: float = Field(0.0, ge=0)


class CosineRouter(LinearRouter):
    """``l_e = x . W_e / ((|x| + t)(|W_e| + t))``, ``p = softmax(l / temperature)``, the k best, rescaled.

    ``t`` is the perturbation (Nguyen et al. 2024). ``reference`` is Cosine-R of LibMoE's first tables: no temperature,
    a bias added to p before choosing, and a second softmax over the k values. As the cosines differ by little, its
    weights are all close to 1/k and the bias decides: nearly every token goes to the same experts.
    """

    Settings = CosineSettings

    def __init__(self, width: int, experts: int, top_k: int, settings: Any) -> None:
        super().__init__(width, experts, top_k, settings)
        self.bias = nn.Parameter(torch.empty(experts)) if self.reference else None

    def forward(self, hidden_TD: Tensor, sequence_T: Tensor | None = None) -> Routing:
        shift = self.settings.perturbation
        length_T1 = hidden_TD.float().norm(dim=1, keepdim=True) + shift
        length_N = self.weight.float().norm(dim=1) + shift
        logits_TN = linear_float(hidden_TD, self.weight) / (length_T1 * length_N)
        if self.bias is not None:
            p_TN = logits_TN.softmax(1)
            best_TK, indices_TK = (p_TN + self.bias.float()).topk(self.top_k, dim=1)
            weights_TK = best_TK.softmax(1)
        else:
            first, last = self.settings.temperature, self.settings.final_temperature
            logits_TN = logits_TN / self.scheduled(first, last or first)
            p_TN = logits_TN.softmax(1)
            best_TK, indices_TK = p_TN.topk(self.top_k, dim=1)
            weights_TK = rescaled(best_TK)
        return routed(indices_TK, weights_TK, p_TN=p_TN, logits_TN=logits_TN, sequence_T=sequence_T)
