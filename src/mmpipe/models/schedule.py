"""Modules that change as training goes on: routers that cool down, temperatures that fall."""

from __future__ import annotations

from torch import nn


class FollowsTraining(nn.Module):
    """A module that is told before every step how far the training of a stage is."""

    progress: float = 0.0

    def step(self, progress: float) -> None:
        """``progress`` is 0 at the start and 1 at the end."""
        self.progress = progress


def tell_progress(model: nn.Module, progress: float) -> None:
    """Tell all modules of ``model`` that follow training."""
    for module in model.modules():
        if isinstance(module, FollowsTraining):
            module.step(progress)
