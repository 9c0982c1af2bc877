"""Running the construction stage."""

from __future__ import annotations

import logging

import torch

from mmpipe.checkpoints.load import build_model
from mmpipe.errors import ConfigError
from mmpipe.stages.base import StageJob
from mmpipe.stages.construct import Construct
from mmpipe.training.publish import publish

log = logging.getLogger(__name__)


def construct_stage(stage: Construct, job: StageJob) -> None:
    """Publish the recipe's model as an ordinary checkpoint.

    Raises ConfigError when a stage comes before this one, ArtifactError when files are missing, surplus, or do not fit.
    """
    if job.parent is not None:
        raise ConfigError(f"{job.recipe}: {job.stage}: a model is constructed before the other stages")
    torch.set_num_threads(job.threads)
    model, processor = build_model(
        job.backbones,
        job.vision_language,
        layouts=job.layouts,
        template=stage.template,
        image_aspect=stage.image_aspect,
        seed=stage.seed,
    )
    log.info("%d parameters", sum(parameter.numel() for parameter in model.parameters()))
    publish(stage, job, model, processor, facts={"template": stage.template, "image_aspect": stage.image_aspect})
