"""Watching routers while they train: a layer whose tokens nearly all make the same choice has collapsed."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from mmpipe.losses.collapse import ALARM
from mmpipe.models.moe.collect import collect_collapse, part_of
from mmpipe.training.objectives.base import ROUTING

log = logging.getLogger(__name__)

LAYERS = f"{ROUTING}collapsed_layers"
"""Column of ``history.jsonl``: how many layers have collapsed. Beside it, ``routing.{part}.top_set`` is the share of the
tokens that make the most common choice in the worst layer of a part."""


class CollapseWatch:
    """Collects the share of the most common choice of each layer over the micro batches of a step.

    A dense model has no layers: nothing is collected and nothing is logged. One process's share of the batch is looked
    at; what it costs is one small transfer a step.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._warned: set[str] = set()

    def see(self, model: nn.Module) -> None:
        """Note the forward pass just made."""
        for name, share in collect_collapse(model).items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(share)) + share
        self._batches += 1

    def take(self, step: int) -> dict[str, float]:
        """What to log of the steps since the last time; says once of a layer that it has collapsed, and that it has
        recovered."""
        if not self._sums:
            return {}
        means = torch.stack(list(self._sums.values())) / self._batches
        shares = dict(zip(self._sums, means.tolist(), strict=True))
        self._sums, self._batches = {}, 0
        collapsed = {name for name, share in shares.items() if share > ALARM}
        for name in sorted(collapsed - self._warned):
            log.warning(
                "step %d: the routing of %s has collapsed: %.0f %% of the tokens make the same choice of experts; "
                "raise balance_coefficient, or lower the router's learning rate (learning_rates)",
                *(step, name, 100 * shares[name]),
            )
        for name in sorted(self._warned - collapsed):
            log.info("step %d: the routing of %s has recovered (%.0f %%)", step, name, 100 * shares[name])
        self._warned = collapsed
        worst: dict[str, float] = {}
        for name, share in shares.items():
            key = f"{ROUTING}{part_of(name)}.top_set"
            worst[key] = max(share, worst.get(key, 0.0))
        return {**worst, LAYERS: float(len(collapsed))}
