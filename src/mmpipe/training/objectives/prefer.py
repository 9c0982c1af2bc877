"""Preference distillation: chosen answers become more likely than rejected ones, relative to a reference model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmpipe.losses.preference import preference_loss, response_log_probabilities
from mmpipe.training.objectives.base import Batch, Metrics, Normaliser, hidden_states, image_features, router_losses
from mmpipe.training.precomputed import Annotations

if TYPE_CHECKING:
    from mmpipe.stages.prefer import Prefer


class Preference:
    """A preference loss over pairs, and the router losses; the reference's log-probabilities were written down once.

    Chosen and rejected answers run one after the other, as in the reference implementation: in one pass they would
    compete for the experts' capacity, and the later ones lose. So the router losses are those of two passes, added up.
    ``kto_pair``'s batch means are over the pairs a device computes at once, as there.
    """

    def __init__(self, settings: Prefer, reference: Annotations) -> None:
        self.settings = settings
        self.reference = reference

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"pairs": len(batch["ids"])}

    def __call__(self, model: Any, batch: Batch, normaliser: Normaliser) -> tuple[Tensor, Metrics]:
        features_FD = image_features(model, batch)
        sums: list[Tensor] = []
        auxiliary = features_FD.new_zeros((), dtype=torch.float32)
        parts: Metrics = {}
        for half in halves(batch):
            hidden_BLD = hidden_states(model, half, features_FD)
            sums += response_log_probabilities(hidden_BLD, model.lm_head.weight, half["labels"])[:1]
            # read before the next pass takes their place
            of_pass, its_parts = router_losses(model, normaliser)
            auxiliary = auxiliary + of_pass
            parts = {name: value + parts.get(name, 0) for name, value in its_parts.items()}
        losses, metrics = preference_loss(
            *sums,
            *(tensor.to(sums[0]) for tensor in self.reference.log_probabilities(batch["indices"])),
            loss_type=self.settings.loss_type,
            beta=self.settings.beta,
            label_smoothing=self.settings.label_smoothing,
            compat=self.settings.compat,
        )
        share = torch.as_tensor(len(batch["ids"]) / normaliser.counts["pairs"], device=losses.device)
        loss = losses.mean() * share
        scaled = {name: value * share for name, value in metrics.items()}
        total = loss + auxiliary if self.settings.router_losses else loss
        return total, {"preference": loss.detach(), **scaled, **parts}


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The chosen and the rejected answers of a batch of pairs, each padded to its own longest row."""
    pairs = len(batch["ids"])
    return _rows(batch, slice(pairs)), _rows(batch, slice(pairs, None))


def _rows(batch: Batch, rows: slice) -> Batch:
    length = int(batch["attention_mask"][rows].sum(1).max())
    cut = {name: batch[name][rows, :length] for name in ("input_ids", "attention_mask", "labels")}
    return batch | cut
