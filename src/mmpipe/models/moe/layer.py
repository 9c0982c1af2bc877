"""The MoE layer that replaces a dense feed-forward network."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpipe.models.moe.context import ForwardPass, LayerReport, TakesForwardPass
from mmpipe.models.moe.routers.base import BaseRouter, Routing, check_shapes, check_values, rescaled
from mmpipe.models.moe.spec import MoESettings


class MoELayer(TakesForwardPass):
    """``y = sum over the chosen experts of weight * expert(x)`` for every token that counts.

    Padding is neither routed nor counted; its output is zero. In evaluation every choice is carried out and nothing is
    random, so that a token's result does not depend on its neighbours. In training, choices beyond an expert's capacity
    are dropped when the settings give one (see :func:`drop`).

    With ``dense`` given, the result is a learned mixture of the experts' and the dense network's (residual MoE,
    Rajbhandari et al. 2022): ``y = c_0 moe(x) + c_1 dense(x)``, ``c = softmax(C x)``.
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
        """The layer's name in the model, for messages."""
        self._values_checked = False

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        current = self.forward_pass or ForwardPass()
        every_TD = hidden_BLD.flatten(0, -2)
        rows_T = None if self.settings.compat == "reference" or current.rows_T is None else current.rows_T
        rows_T = None if rows_T is None else rows_T.to(every_TD.device)
        hidden_TD = every_TD if rows_T is None else every_TD[rows_T]
        routing, retained_TK = self._route(hidden_TD, self._sequences(hidden_BLD, rows_T))
        output_TD = self.experts(hidden_TD, routing.indices_TK, routing.weights_TK.to(hidden_TD.dtype))
        if routing.addition_TD is not None:
            output_TD = output_TD + routing.addition_TD.to(output_TD.dtype)
        if id(self) not in current.reports:
            current.reports[id(self)] = self._report(routing, retained_TK)
        if rows_T is not None:
            output_TD = output_TD.new_zeros(len(every_TD), output_TD.shape[1]).index_copy(0, rows_T, output_TD)
        output_BLD = output_TD.view(*hidden_BLD.shape[:-1], -1)
        if self.dense is None or self.mixture is None:
            return output_BLD
        share_BL2 = F.softmax(self.mixture(hidden_BLD), dim=-1)
        return share_BL2[..., :1] * output_BLD + share_BL2[..., 1:] * self.dense(hidden_BLD)

    def _sequences(self, hidden_BLD: Tensor, rows_T: Tensor | None) -> Tensor | None:
        if self.settings.balance_within == "batch":
            return None
        if rows_T is None:
            rows_T = torch.arange(hidden_BLD.shape[:-1].numel(), device=hidden_BLD.device)
        return rows_T // hidden_BLD.shape[-2]

    def _route(self, hidden_TD: Tensor, sequence_T: Tensor | None) -> tuple[Routing, Tensor]:
        """The routing of ``T`` tokens after dropping, and which choices were retained, ``[T, K]``."""
        router, name = self.router, f"router '{self.settings.router}'" + (f" in {self.where}" if self.where else "")
        routing = router(hidden_TD, sequence_T)
        check_shapes(router, routing, len(hidden_TD), name)
        if hidden_TD.device.type == "cpu" or not self._values_checked:
            # reading values synchronises an accelerator: once per layer there, always on the CPU
            check_values(router, routing, name)
            self._values_checked = True
        if not self.training or self.settings.capacity_factor is None:
            return routing, torch.ones_like(routing.indices_TK, dtype=torch.bool)
        top_k, factor = routing.indices_TK.shape[1], self.settings.capacity_factor
        slots = capacity(len(hidden_TD), router.experts, top_k, factor, self.settings.minimum_capacity)
        weights_TK, retained_TK = drop(
            routing.indices_TK, routing.weights_TK, router.experts, slots, rescale=router.normalised
        )
        return replace(routing, weights_TK=weights_TK), retained_TK

    def _report(self, routing: Routing, retained_TK: Tensor) -> LayerReport:
        weights = {
            "balance": self.settings.balance_coefficient,
            "z": self.settings.z_coefficient,
            "entropy": self.settings.entropy_coefficient,
        }
        weighed = {name: weights.get(name, 1.0) for name in routing.losses}
        losses = {name: weight * routing.losses[name] for name, weight in weighed.items() if weight}
        with torch.no_grad():
            statistics = {name: value.detach() for name, value in routing.statistics.items()}
            # dropped choices and null experts have weight zero
            works_TK = routing.weights_TK != 0
            statistics["load"] = torch.bincount(routing.indices_TK[works_TK], minlength=self.router.experts)
            statistics["tokens"] = torch.tensor(len(retained_TK), device=retained_TK.device)
            statistics["dropped"] = (~retained_TK).sum()
            indices_TK = routing.indices_TK.where(works_TK | ~retained_TK, self.router.experts)
        return LayerReport(losses, statistics, indices_TK)


def capacity(tokens: int, experts: int, top_k: int, factor: float, minimum: int = 0) -> int:
    """Slots of an expert: ``ceil(tokens / experts * factor * top_k)``, at least ``minimum``."""
    return max(math.ceil(tokens / experts * factor * top_k), minimum)


def drop(indices_TK: Tensor, weights_TK: Tensor, experts: int, slots: int, *, rescale: bool) -> tuple[Tensor, Tensor]:
    """Set the weights of choices beyond an expert's ``slots`` to zero; returns ``(weights_TK, retained_TK)``.

    DeepSpeed's rule, which LLaVA-MoD trains with: first choices take slots in the order of the tokens, then second
    choices queue behind *all* first choices, dropped ones included, and so on. Late tokens, which are the answers, are
    dropped first. A dropped choice keeps its index: it is computed and counts nothing. ``rescale`` makes the weights of
    each token's other choices add up to one again; a token without any passes through the residual stream only.
    """
    retained_TK = slot_numbers(indices_TK, experts) < slots
    weights_TK = weights_TK * retained_TK
    return rescaled(weights_TK) if rescale else weights_TK, retained_TK


def slot_numbers(indices_TK: Tensor, experts: int) -> Tensor:
    """The place of each choice in its expert's queue, ``[T, K]``, from zero."""
    queue_KT = indices_TK.T.flatten()
    taken_QN = F.one_hot(queue_KT, experts).cumsum(0) - 1
    return taken_QN.gather(1, queue_KT[:, None]).view(indices_TK.T.shape).T
