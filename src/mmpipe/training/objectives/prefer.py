"""Preference distillation: chosen answers become more probable than rejected ones, relative to a reference model."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mmpipe.data.dataset import Batch, Padding, PreferenceCollator, PreferenceDataset
from mmpipe.data.tokens import TokenTable
from mmpipe.errors import ConfigError
from mmpipe.losses.preference import preference_loss, response_log_probabilities
from mmpipe.models import llava
from mmpipe.models.moe.collect import moe_layers
from mmpipe.stages import zero
from mmpipe.stages.base import StageJob
from mmpipe.stages.prefer import Prefer
from mmpipe.training.objectives import base
from mmpipe.training.precomputed import PrecomputedLogProbs


class Preference(base.Objective):
    """A preference loss over pairs with precomputed reference log-probabilities, and the router losses.

    Chosen and rejected answers run one after the other, as in the reference implementation: in one pass they would
    compete for the experts' capacity, and later ones would be dropped. The router losses of the two passes are summed.
    ``kto_pair``'s batch means are over a micro batch, also as in the reference.
    """

    COLLATOR: ClassVar[type[Padding]] = PreferenceCollator

    def __init__(self, settings: Prefer, reference: PrecomputedLogProbs) -> None:
        self.settings = settings
        self.reference = reference

    @classmethod
    def create(cls, stage: Prefer, job: StageJob, model: Any, processor: Any) -> Preference:
        """Raises ConfigError for experts under ZeRO stage 3, and for a reference with another image preprocessing."""
        kind = stage.hardware.deepspeed
        if kind and zero.optimization(kind)["stage"] == 3 and moe_layers(model):
            raise ConfigError(
                f"{job.recipe}: {job.stage}: hardware.deepspeed: '{kind}' cannot train experts here: DeepSpeed reduces "
                "their gradients once a pass, and a preference step has two; take 'zero2' or 'zero2_offload'"
            )
        reference = PrecomputedLogProbs(job.precomputed["reference"])
        reference.require_tokenizer(processor.tokenizer)
        reference.require_pixels(processor.image_processor, "reference")
        return cls(stage, reference)

    @staticmethod
    def dataset(stage: Prefer, tokens: TokenTable, image_processor: Any) -> PreferenceDataset:
        return PreferenceDataset(tokens, image_processor)

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"pairs": len(batch["ids"])}

    def __call__(self, model: Any, batch: Batch, denominators: base.LossDenominators) -> tuple[Tensor, base.Metrics]:
        features_FD = llava.image_features(model, batch)
        sums: list[Tensor] = []
        auxiliary = features_FD.new_zeros((), dtype=torch.float32)
        parts: base.Metrics = {}
        for half in halves(batch):
            hidden_BLD = llava.hidden_states(model, half, features_FD)
            sums += response_log_probabilities(hidden_BLD, model.lm_head.weight, half["labels"])[:1]
            # read before the next pass overwrites them
            added, its_parts = base.router_losses(model, denominators)
            auxiliary = auxiliary + added
            parts = {name: value + parts.get(name, 0) for name, value in its_parts.items()}
        losses, metrics = preference_loss(
            *sums,
            *(tensor.to(sums[0]) for tensor in self.reference.log_probabilities(batch["indices"])),
            loss_type=self.settings.loss_type,
            beta=self.settings.beta,
            label_smoothing=self.settings.label_smoothing,
            compat=self.settings.compat,
        )
        share = torch.as_tensor(len(batch["ids"]) / denominators.counts["pairs"], device=losses.device)
        loss = losses.mean() * share
        scaled = {name: value * share for name, value in metrics.items()}
        total = loss + auxiliary if self.settings.router_losses else loss
        return total, {"preference": loss.detach(), **scaled, **parts}


OBJECTIVE = Preference


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The chosen and the rejected answers of a batch of pairs, each padded to its own longest row."""

    def rows(chosen: slice) -> Batch:
        length = int(batch["attention_mask"][chosen].sum(1).max())
        cut = {name: batch[name][chosen, :length] for name in ("input_ids", "attention_mask", "labels")}
        return cast(Batch, {**batch, **cut})

    pairs = len(batch["ids"])
    return rows(slice(pairs)), rows(slice(pairs, None))
