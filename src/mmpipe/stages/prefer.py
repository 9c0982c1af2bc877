"""Preference distillation: the student learns to prefer the chosen of two answers, relative to a reference."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mmpipe.stages.base import Precomputation, TrainStage


class Prefer(TrainStage):
    """Defaults are LLaVA-MoD's ``preference_distillation.sh``: ``kto_pair``, beta 0.1, learning rate 2e-6."""

    VERSION: ClassVar[int] = 2

    reference: str
    """The checkpoint of the reference log-probabilities: the dense teacher, or the student before this stage."""
    loss_type: Literal["kto_pair", "sigmoid", "hinge", "ipo"] = "kto_pair"
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """For ``sigmoid`` only: the assumed fraction of pairs with flipped labels."""
    learning_rate: float = Field(2e-6, gt=0)
    trainable: tuple[str, ...] = ("language_model.layers.*.mlp.*", "multi_modal_projector.*")
    router_losses: bool = True
    """Train on the router losses of a student with experts (LLaVA-MoD's ``moe_loss_enable``); they are logged anyway."""
    compat: Literal["fixed", "reference"] = "fixed"
    """``reference``: the batch means of ``kto_pair`` carry gradients, as in the published code."""

    @model_validator(mode="after")
    def _smoothing_belongs_to_sigmoid(self) -> Prefer:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"'label_smoothing' belongs to 'loss_type: sigmoid', not to '{self.loss_type}'; leave it out"
            )
        return self

    def precomputations(self) -> dict[str, Precomputation]:
        return {"reference": self.precomputation(self.reference, {"kind": "log_probabilities"})}


STAGE = Prefer
