"""Pre-finetuning: every part of the dense model learns on detailed captions before up-cycling."""

from __future__ import annotations

from mmpipe.stages.base import TrainStage


class Prefinetune(TrainStage):
    """LibMoE's (and CuMo's) second stage; defaults are the CLIP script's of LibMoE 1.1 (one epoch, batch 96)."""

    trainable: tuple[str, ...] = ("*",)
    batch_size: int = 96
    learning_rate: float = 2e-6


STAGE = Prefinetune
