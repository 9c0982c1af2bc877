"""Softmax over the experts, the k most probable chosen, their probabilities rescaled to one."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmpipe.models.moe.routers.base import LinearRouter, Routing, linear_float, rescaled, routed
from mmpipe.models.moe.spec import RouterSettings


class TopKSettings(RouterSettings):
    """Settings of :class:`TopKRouter`."""

    second_choice: Literal["most_likely", "gumbel", "gumbel_always"] = "most_likely"
    """Selection of the second expert: the most probable of the others; or by adding Gumbel noise to the
    logits, in training or also in evaluation. DeepSpeed before 0.15, hence LLaVA-MoD, always samples;
    ``compat: reference`` of the experts takes ``gumbel``, so that answers stay the same from run to run."""


class TopKRouter(LinearRouter):
    """``p = softmax(W x)``; for k > 1 the weights are ``p / sum of the chosen p``.

    With one expert a token the weight is p itself: rescaled it would be the constant one, and the router
    would learn nothing from the task.

    All arithmetic is in float32. Deterministic unless ``second_choice`` adds noise. LibMoE's SMoE-R; its
    ``reference`` form differs in its initialisation only.
    """

    Settings = TopKSettings

    STARTS_ALIKE: ClassVar[bool] = True

    @property
    def normalised(self) -> bool:
        return self.top_k > 1

    def forward(self, hidden_TD: Tensor, sequence_T: Tensor | None = None) -> Routing:
        logits_TN = linear_float(hidden_TD, self.weight)
        indices_TK = self._choose(logits_TN)
        p_TN = logits_TN.softmax(1)
        weights_TK = p_TN.gather(1, indices_TK)
        if self.normalised:
            weights_TK = rescaled(weights_TK)
        return routed(indices_TK, weights_TK, p_TN=p_TN, logits_TN=logits_TN, sequence_T=sequence_T)

    def _choose(self, logits_TN: Tensor) -> Tensor:
        sampling = self.settings.second_choice == "gumbel_always" or (
            self.settings.second_choice == "gumbel" and self.training
        )
        if self.top_k < 2 or not sampling:
            return logits_TN.topk(self.top_k, dim=1).indices
        first_T1 = logits_TN.argmax(1, keepdim=True)
        noisy_TN = logits_TN.detach() + gumbel(logits_TN)
        others_TK = noisy_TN.scatter(1, first_T1, float("-inf")).topk(self.top_k - 1, dim=1).indices
        return torch.cat([first_T1, others_TK], 1)


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape of ``like``, from torch's global generator."""
    return -torch.empty_like(like).exponential_().log()
