"""The objective of a stage, and language modelling, the objective of stages that have no other.

An objective turns a batch into a loss and the terms to log. Token-wise terms are summed and divided by the number of
supervised tokens in the *global* batch: the loss does not depend on how the batch is split over micro batches and devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpipe.data.dataset import Batch, Collator, Padding, RecordDataset, SupervisedDataset
from mmpipe.data.tokens import TokenTable
from mmpipe.errors import MmpipeError
from mmpipe.losses.language_modelling import language_modelling_loss
from mmpipe.models.llava import hidden_states
from mmpipe.models.moe.collect import collect_losses, collect_statistics, part_of
from mmpipe.stages.base import StageJob

ROUTING = "routing."
"""Prefix of metrics that are measured, not optimised."""

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class LossDenominators:
    """Denominators of the terms of a micro batch, so that they add up over the global batch."""

    counts: Mapping[str, Tensor]
    """The counts of :meth:`Objective.counts` over the global batch: denominators of sums."""
    micro_batches: int
    """Micro batches of the global batch over all devices: the denominator of terms that are means."""


class Objective(ABC):
    """The objective of a stage: its loss, its data, and its changes to the starting model."""

    COLLATOR: ClassVar[type[Padding]] = Collator
    """The collator: a batch from samples."""

    @classmethod
    def create(cls, stage: Any, job: StageJob, model: Any, processor: Any) -> Objective:
        """The objective of one job; ``stage`` is the settings class of the same name."""
        return cls()

    @staticmethod  # noqa: B027 - most stages change nothing
    def prepare(stage: Any, job: StageJob, model: Any) -> None:
        """Change the starting model before it trains, in place."""

    @staticmethod
    def dataset(stage: Any, tokens: TokenTable, image_processor: Any) -> RecordDataset[Any]:
        """The samples of a tokenised mixture."""
        return SupervisedDataset(tokens, image_processor)

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int]:
        """Counts of a micro batch that, summed over the global batch, are the denominators of its terms."""

    @abstractmethod
    def __call__(self, model: Any, batch: Batch, denominators: LossDenominators) -> tuple[Tensor, Metrics]:
        """Loss (scalar with gradient) and metrics of a micro batch.

        Metrics are detached and add up to the global value over the micro batches. A metric of two numbers is a mean:
        a weighted sum and its weight, each added up before they are divided.
        """


class LanguageModelling(Objective):
    """Cross entropy of the supervised tokens, and the router losses of a sparse model."""

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"response": response_tokens(batch)}

    def __call__(self, model: Any, batch: Batch, denominators: LossDenominators) -> tuple[Tensor, Metrics]:
        hidden_BLD = hidden_states(model, batch)
        loss = language_modelling_loss(
            hidden_BLD, model.lm_head.weight, batch["labels"], denominator=denominators.counts["response"]
        )
        auxiliary, parts = router_losses(model, denominators)
        return loss + auxiliary, {"cross_entropy": loss.detach(), **parts}


OBJECTIVE = LanguageModelling


def response_tokens(batch: Batch) -> int:
    """Supervised tokens of a micro batch, without the first position, which is not predicted."""
    return int((batch["labels"][:, 1:] != -100).sum())


def router_losses(model: nn.Module, denominators: LossDenominators) -> tuple[Tensor, Metrics]:
    """The router losses of the last forward pass, their parts, and routing statistics; zero and none for a dense model."""
    total, parts = collect_losses(model)
    losses = {f"router_{name}": value / denominators.micro_batches for name, value in parts.items()}
    return total / denominators.micro_batches, losses | routing_statistics(model)


def routing_statistics(model: nn.Module) -> Metrics:
    """Means over the tokens and layers of each part with experts, as weighted sum and weight.

    ``routing.{part}.load`` is the share of the choices that go to the busiest expert of a layer (1/N when all are used
    alike, 1 when one takes all); entropy and margin are the routers' own.
    """
    sums: Metrics = {}
    for layer, found in collect_statistics(model).items():
        tokens = found["tokens"].float()
        load = found["load"].max() / found["load"].sum().clamp_min(1)
        values = {"load": load} | {name: found[name] for name in ("entropy", "margin") if name in found}
        for name, value in values.items():
            key = f"{ROUTING}{part_of(layer)}.{name}"
            pair = torch.stack([value.float() * tokens, tokens])
            sums[key] = sums[key] + pair if key in sums else pair
    return sums


class Task(nn.Module):
    """Model and objective as one module, so that a step is one forward pass for DDP and DeepSpeed."""

    main_input_name = "input_ids"

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    @property
    def config(self) -> Any:
        """The model's configuration, which the trainer expects here."""
        return self.model.config

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Frozen parameters may be missing: training checkpoints leave them out."""
        loaded = super().load_state_dict(state_dict, strict=False, assign=assign)
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        wrong = sorted(trained & set(loaded.missing_keys)) + list(loaded.unexpected_keys)
        if strict and wrong:
            raise MmpipeError(f"the checkpoint holds other parameters than this stage trains: {wrong[:5]}")
        return loaded

    def forward(self, batch: Batch, denominators: LossDenominators) -> tuple[Tensor, Metrics]:
        return self.objective(self.model, batch, denominators)
