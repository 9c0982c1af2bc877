"""The line printed before the first job of a run: how much it will train."""

from __future__ import annotations

from collections.abc import Iterable

from mmpipe.plan.plan import Plan, StagePlan

_SHOWN = 8


def announcement(plan: Plan, stages: Iterable[StagePlan], smoke: bool) -> str:
    """A line about the stages that a run is going to train; empty when it trains none."""
    found = sorted({stage.id: stage for stage in stages}.items())
    if not found:
        return ""
    names = ", ".join(name for name, _ in found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
    gpus = max(stage.settings.hardware.gpus for _, stage in found)
    length = f"{plan.config.smoke.max_steps} steps each (smoke)" if smoke else "in full"
    where = f"on up to {gpus} GPUs" if gpus else "on the CPU"
    count = "1 stage" if len(found) == 1 else f"{len(found)} stages"
    return f"This run trains {count} {where}, {length}: {names}. What each needs: mmpipe plan"
