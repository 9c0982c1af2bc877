"""Running the up-cycling stage."""

from __future__ import annotations

import logging

import torch

from mmpipe.checkpoints.dummy_inputs import dummy_inputs
from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.errors import ConfigError
from mmpipe.models.moe.upcycle import assert_equal_to_parent, logits, upcycle
from mmpipe.stages.base import StageJob
from mmpipe.stages.upcycle import Upcycle
from mmpipe.training.publish import publish

log = logging.getLogger(__name__)


def upcycle_stage(stage: Upcycle, job: StageJob) -> None:
    """Up-cycle the parent's checkpoint, verify that the logits are equal, and publish it."""
    if job.parent is None:
        raise ConfigError(f"{job.recipe}: {job.stage}: there is no model to up-cycle; put a training stage before it")
    torch.set_num_threads(job.threads)
    model, processor, card = open_checkpoint(job.parent)
    batch = dummy_inputs(model)
    before = logits(model, batch)
    for part, settings in stage.of_parts().items():
        upcycle(model, settings, seed=stage.seed, part=part)
    difference = assert_equal_to_parent(before, model, batch, stage.tolerance)
    log.info("the sparse model equals its dense parent: largest difference of logits %.3g", difference)
    publish(stage, job, model, processor, facts=card["checkpoint"])
