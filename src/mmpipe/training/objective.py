"""What a stage optimises, as the trainer sees it.

An objective turns a batch into a loss and the terms to log. Token-wise terms are summed and divided by the number of supervised
tokens in the *global* batch, so that the loss does not depend on how the batch is cut over steps and devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmpipe.objectives.language_modelling import language_modelling_loss

Batch = dict[str, Any]


@dataclass(frozen=True)
class Normaliser:
    """How one micro batch's share of the global batch is weighed."""

    items: Tensor
    """Supervised items of the global batch (scalar): the divisor of item-wise sums."""
    micro_batches: int
    """Micro batches of the global batch over all devices: the divisor of terms that are means already."""


class Objective(Protocol):
    """An objective; ``metrics`` are detached and sum to the global value over the micro batches."""

    def items(self, batch: Batch) -> int:
        """Number of supervised items of a micro batch."""
        ...

    def __call__(self, model: Any, batch: Batch, normaliser: Normaliser) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar with gradient) and metrics of a micro batch."""
        ...


class LanguageModelling:
    """Cross entropy of the supervised tokens."""

    def items(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != -100).sum())

    def __call__(self, model: Any, batch: Batch, normaliser: Normaliser) -> tuple[Tensor, dict[str, Tensor]]:
        hidden_BLD = hidden_states(model, batch)
        loss = language_modelling_loss(
            hidden_BLD, model.lm_head.weight, batch["labels"], normaliser=normaliser.items
        )
        return loss, {"cross_entropy": loss.detach()}


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Run the vision-language model without its head; returns hidden states ``[batch, length, width]``.

    The vision tower and the projector always run, also for a batch without pictures: devices that wait for each other's gradients
    must see the same parameters used in every step.
    """
    body = model.model
    if not batch["dummy_image"]:
        return body(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"],
            use_cache=False,
        ).last_hidden_state
    features = body.get_image_features(pixel_values=batch["pixel_values"], return_dict=True).pooler_output
    nothing = 0.0 * torch.stack(list(features)).sum()
    embeddings = body.get_input_embeddings()(batch["input_ids"]) + nothing
    return body(
        inputs_embeds=embeddings, attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state


class Task(nn.Module):
    """Model and objective as one module, so that whatever wraps modules (DDP, DeepSpeed) sees every step as one forward."""

    main_input_name = "input_ids"

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    @property
    def config(self) -> Any:
        """The model's configuration, where the trainer looks for it."""
        return self.model.config

    def forward(self, batch: Batch, normaliser: Normaliser) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(self.model, batch, normaliser)
