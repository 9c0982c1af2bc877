"""Modules with a schedule over the training: routing, temperatures."""

from __future__ import annotations

from torch import nn


class FollowsTraining(nn.Module):
    """A module whose ``step`` is called before every training step with the progress of the stage."""

    progress: float = 0.0

    def step(self, progress: float) -> None:
        """``progress`` is 0 at the start and 1 at the end."""
        self.progress = progress


def set_progress(model: nn.Module, progress: float) -> None:
    """Set the training progress of all scheduled modules of ``model``."""
    for module in model.modules():
        if isinstance(module, FollowsTraining):
            module.step(progress)
