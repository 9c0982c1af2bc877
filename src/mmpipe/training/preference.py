"""Preference distillation: chosen answers become more likely than rejected ones, relative to a reference model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmpipe.objectives.preference import preference_loss, response_log_probabilities
from mmpipe.training.annotations import Annotations
from mmpipe.training.objective import Batch, Metrics, Normaliser, hidden_states, router_losses

if TYPE_CHECKING:
    from mmpipe.stages.prefer import Prefer


class Preference:
    """A preference loss over pairs; the reference's log-probabilities were written down once.

    ``kto_pair``'s batch means are over the pairs a device computes at once, as in the reference implementation.
    """

    def __init__(self, settings: Prefer, reference: Annotations) -> None:
        self.settings = settings
        self.reference = reference

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"pairs": len(batch["ids"])}

    def __call__(self, model: Any, batch: Batch, normaliser: Normaliser) -> tuple[Tensor, Metrics]:
        pairs = len(batch["ids"])
        sums_B, _ = response_log_probabilities(
            hidden_states(model, batch), model.lm_head.weight, batch["labels"]
        )
        chosen_B, rejected_B = (
            tensor.to(sums_B) for tensor in self.reference.log_probabilities(batch["indices"])
        )
        losses, metrics = preference_loss(
            sums_B[:pairs],
            sums_B[pairs:],
            chosen_B,
            rejected_B,
            loss_type=self.settings.loss_type,
            beta=self.settings.beta,
            label_smoothing=self.settings.label_smoothing,
            compat=self.settings.compat,
        )
        share = torch.as_tensor(pairs / normaliser.counts["pairs"], device=losses.device)
        loss = losses.mean() * share
        auxiliary, parts = router_losses(model, normaliser)
        scaled = {name: value * share for name, value in metrics.items()}
        return loss + auxiliary, {"preference": loss.detach(), **scaled, **parts}
