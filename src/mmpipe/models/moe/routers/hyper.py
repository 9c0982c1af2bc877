"""HyperRouter: a fixed random network computes the routing weights from a small trainable embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmpipe.models.moe.routers.base import BaseRouter, Routing, linear_float, routed
from mmpipe.models.moe.spec import RouterSettings


class HyperSettings(RouterSettings):
    """Settings of :class:`HyperRouter`."""

    first_k: int = Field(1, ge=1)
    """Experts a token at the start of training."""


class HyperRouter(BaseRouter):
    """``[W, b] = hypernet(u)`` reshaped to ``[N, D + 1]``; the k best of ``W x + b``, softmax over them (Do
    et al. 2023).

    The hypernet (two layers, D/4 inner units) is random and stays so: its tensors are buffers. Only ``u``
    learns. In training, k grows linearly from ``first_k`` to the layer's ``top_k``; evaluation always uses
    ``top_k``. ``reference``, LibMoE's first version, has no router losses.
    """

    Settings = HyperSettings

    def __init__(self, width: int, experts: int, top_k: int, settings: Any) -> None:
        super().__init__(width, experts, top_k, settings)
        inner = max(1, width // 4)
        self.embedding = nn.Parameter(torch.empty(1, width))
        self.register_buffer("inner_weight", torch.empty(inner, width))
        self.register_buffer("inner_bias", torch.empty(inner))
        self.register_buffer("outer_weight", torch.empty(experts * (width + 1), inner))
        self.register_buffer("outer_bias", torch.empty(experts * (width + 1)))

    def reset_parameters(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.embedding.normal_(generator=generator)
            self.get_buffer("inner_weight").normal_(std=0.02, generator=generator)
            self.get_buffer("outer_weight").normal_(std=0.02, generator=generator)
            self.get_buffer("inner_bias").zero_()
            self.get_buffer("outer_bias").zero_()

    @property
    def current_k(self) -> int:
        """Experts a token at this point of training."""
        first = min(self.settings.first_k, self.top_k)
        # rounded as in the published code: halves to the even number
        return first + round(self.scheduled(0, self.top_k - first))

    def forward(self, hidden_TD: Tensor, sequence_T: Tensor | None = None) -> Routing:
        buffer = {name: tensor.float() for name, tensor in self.named_buffers()}
        inner = F.relu(F.linear(self.embedding.float(), buffer["inner_weight"], buffer["inner_bias"]))
        made = F.linear(inner, buffer["outer_weight"], buffer["outer_bias"]).view(self.experts, self.width + 1)
        logits_TN = linear_float(hidden_TD, made[:, :-1], made[:, -1])
        best_TK, indices_TK = logits_TN.topk(self.current_k, dim=1)
        weights_TK = best_TK.softmax(1)
        p_TN = logits_TN.softmax(1)
        result = routed(indices_TK, weights_TK, p_TN=p_TN, logits_TN=logits_TN, sequence_T=sequence_T)
        return replace(result, losses={}) if self.reference else result
