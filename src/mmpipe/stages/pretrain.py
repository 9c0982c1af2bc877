"""Feature alignment (adaptor initialisation): the projector alone learns on captions."""

from __future__ import annotations

from typing import ClassVar, Literal

from mmpipe.stages.base import TemplateName, TrainStage


class Pretrain(TrainStage):
    """LLaVA's first stage; defaults are LLaVA-1.5's ``pretrain.sh`` (558K captions, one epoch, batch 256)."""

    PUBLISHES: ClassVar[Literal["projector", "model"]] = "projector"

    template: TemplateName = "plain"
    image_aspect: Literal["pad", "square"] = "square"
    trainable: tuple[str, ...] = ("multi_modal_projector.*",)
    batch_size: int = 256
    learning_rate: float = 1e-3


STAGE = Pretrain
