"""A layer of experts in the place of a dense feed-forward network."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpipe.models.moe.capacity import capacity, drop
from mmpipe.models.moe.context import ForwardPass, Report, TakesForwardPass
from mmpipe.models.moe.routers.base import BaseRouter, Routing, check_shapes, check_values
from mmpipe.models.moe.spec import MoESettings


class MoELayer(TakesForwardPass):
    """``y = sum over the chosen experts of weight * expert(x)`` for every token that counts.

    Padding is neither routed nor counted; its output is zero. In evaluation every choice is carried out and
    nothing is random, so that a token's result does not depend on its neighbours. In training, choices beyond
    an expert's capacity are dropped when the settings give one.

    With ``dense`` given, the result is a learned mixture of the experts' and the dense network's (residual
    MoE, Rajbhandari et al. 2022): ``y = c_0 moe(x) + c_1 dense(x)``, ``c = softmax(C x)``.
    """

    def __init__(
        self, experts: nn.Module, router: BaseRouter, settings: MoESettings, dense: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.experts = experts
        self.router = router
        self.settings = settings
        self.dense = dense
        self.mixture = nn.Linear(router.width, 2) if dense is not None else None
        self.where = ""
        """Where in the model the layer stands, for messages."""
        self._values_checked = False

    @property
    def described(self) -> str:
        """The layer in messages: its router and its place."""
        return f"router '{self.settings.router}'" + (f" in {self.where}" if self.where else "")

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        current = self.forward_pass or ForwardPass()
        rows_T = None if self.settings.compat == "reference" else current.rows_T
        every_TD = hidden_BLD.flatten(0, -2)
        rows_T = None if rows_T is None else rows_T.to(every_TD.device)
        hidden_TD = every_TD if rows_T is None else every_TD[rows_T]
        routing, kept_TK = self._route(hidden_TD, self._sequences(hidden_BLD, rows_T))
        output_TD = self.experts(hidden_TD, routing.indices_TK, routing.weights_TK.to(hidden_TD.dtype))
        if routing.addition_TD is not None:
            output_TD = output_TD + routing.addition_TD.to(output_TD.dtype)
        if id(self) not in current.reports:
            current.reports[id(self)] = self._report(routing, kept_TK)
        if rows_T is not None:
            output_TD = output_TD.new_zeros(len(every_TD), output_TD.shape[1]).index_copy(0, rows_T, output_TD)
        return self._mix(hidden_BLD, output_TD.view(*hidden_BLD.shape[:-1], -1))

    def _sequences(self, hidden_BLD: Tensor, rows_T: Tensor | None) -> Tensor | None:
        if self.settings.balance_within == "batch":
            return None
        length = hidden_BLD.shape[-2]
        if rows_T is None:
            rows_T = torch.arange(hidden_BLD.shape[:-1].numel(), device=hidden_BLD.device)
        return rows_T // length

    def _route(self, hidden_TD: Tensor, sequence_T: Tensor | None) -> tuple[Routing, Tensor]:
        routing = self.router(hidden_TD, sequence_T)
        check_shapes(self.router, routing, len(hidden_TD), self.described)
        if hidden_TD.device.type == "cpu" or not self._values_checked:
            # looking at values makes an accelerator wait: once per layer there, always on the CPU
            check_values(self.router, routing, self.described)
            self._values_checked = True
        kept_TK = torch.ones_like(routing.indices_TK, dtype=torch.bool)
        if self.training and self.settings.capacity_factor is not None:
            top_k = routing.indices_TK.shape[1]
            slots = capacity(
                len(hidden_TD),
                self.router.experts,
                top_k,
                self.settings.capacity_factor,
                self.settings.minimum_capacity,
            )
            weights_TK, kept_TK = drop(
                routing.indices_TK, routing.weights_TK, self.router.experts, slots, rescale=self.router.normalised
            )
            routing = replace(routing, weights_TK=weights_TK)
        return routing, kept_TK

    def _report(self, routing: Routing, kept_TK: Tensor) -> Report:
        weights = {
            "balance": self.settings.balance_coefficient,
            "z": self.settings.z_coefficient,
            "entropy": self.settings.entropy_coefficient,
        }
        weighed = {name: weights.get(name, 1.0) for name in routing.losses}
        losses = {name: weight * routing.losses[name] for name, weight in weighed.items() if weight}
        with torch.no_grad():
            statistics = {name: value.detach() for name, value in routing.statistics.items()}
            # dropped choices and those that do nothing (a null or free expert) have weight zero
            works_TK = routing.weights_TK != 0
            carried_out = routing.indices_TK[works_TK]
            statistics["load"] = torch.bincount(carried_out, minlength=self.router.experts)
            statistics["tokens"] = torch.tensor(len(kept_TK), device=kept_TK.device)
            statistics["dropped"] = (~kept_TK).sum()
            indices_TK = routing.indices_TK.where(works_TK | ~kept_TK, self.router.experts)
        return Report(losses, statistics, indices_TK)

    def _mix(self, hidden_BLD: Tensor, output_BLD: Tensor) -> Tensor:
        if self.dense is None or self.mixture is None:
            return output_BLD
        share_BL2 = F.softmax(self.mixture(hidden_BLD), dim=-1)
        return share_BL2[..., :1] * output_BLD + share_BL2[..., 1:] * self.dense(hidden_BLD)
