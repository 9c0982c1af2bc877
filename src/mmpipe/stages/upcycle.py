"""Up-cycling: the dense student becomes a sparse one that computes the same; fails unless it does."""

from __future__ import annotations

from typing import ClassVar

from mmpipe.models.moe.spec import MoESettings
from mmpipe.stages.base import Stage, StageJob


class Upcycle(Stage):
    """Copies feed-forward networks into experts and puts fresh routers before them."""

    ON_GPUS: ClassVar[bool] = False

    moe: MoESettings = MoESettings()
    tolerance: float = 1e-5
    """Largest difference of logits between the sparse model and its dense parent, relative to the largest logit."""

    def run(self, job: StageJob) -> None:
        from mmpipe.training.upcycle import upcycle_stage

        upcycle_stage(self, job)


STAGE = Upcycle
