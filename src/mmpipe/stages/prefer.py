"""Preference distillation: the student learns which of two answers a reference would rather give."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from mmpipe.stages.base import Annotation, StageJob, TrainStage


class Prefer(TrainStage):
    """Defaults are LLaVA-MoD's ``preference_distillation.sh``: ``kto_pair``, beta 0.1, learning rate 2e-6."""

    VERSION: ClassVar[int] = 2

    reference: str
    """The checkpoint whose log-probabilities are the yardstick: the dense teacher, or the student itself before."""
    loss_type: Literal["kto_pair", "sigmoid", "hinge", "ipo"] = "kto_pair"
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """For ``sigmoid`` only: the share of pairs assumed to be labelled the wrong way round."""
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

    def annotations(self) -> dict[str, Annotation]:
        return {"reference": self.annotation(self.reference, {"kind": "log_probabilities"})}

    def dataset(self, tokens: Any, processor: Any) -> Any:
        from mmpipe.data.dataset import PreferenceDataset

        return PreferenceDataset(tokens, processor)

    def collator(self, pad_token_id: int, image_size: tuple[int, int]) -> Any:
        from mmpipe.data.dataset import PreferenceCollator

        return PreferenceCollator(pad_token_id, image_size)

    def objective(self, job: StageJob, model: Any, processor: Any) -> Any:
        from mmpipe.errors import ConfigError
        from mmpipe.models.moe.collect import moe_layers
        from mmpipe.training import deepspeed
        from mmpipe.training.objectives.prefer import Preference
        from mmpipe.training.precomputed import Annotations

        spread = self.hardware.deepspeed
        if spread and deepspeed.optimization(spread)["stage"] == 3 and moe_layers(model):
            raise ConfigError(
                f"{job.recipe}: {job.stage}: hardware.deepspeed: '{spread}' cannot train experts here: DeepSpeed reduces "
                "their gradients once a pass, and a preference step has two; take 'zero2' or 'zero2_offload'"
            )
        written = Annotations(job.annotations["reference"])
        written.require_tokenizer(processor.tokenizer)
        written.require_pixels(processor.image_processor, "reference")
        return Preference(self, written)


STAGE = Prefer
