"""Visual instruction tuning: the language model and the projector learn on conversations."""

from __future__ import annotations

from mmpipe.stages.base import TrainStage


class Finetune(TrainStage):
    """LLaVA's second stage; defaults are LLaVA-1.5's ``finetune.sh`` (665K conversations, one epoch, batch 128)."""


STAGE = Finetune
