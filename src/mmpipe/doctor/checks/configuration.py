"""Whether the configuration can be carried out at all."""

from __future__ import annotations

from collections.abc import Iterator

from mmpipe.doctor.base import Finding, Machine


def check(machine: Machine) -> Iterator[Finding]:
    plan = machine.plan  # raises ConfigError with everything that is wrong
    made = sum(stage.manifest().is_file() for stage in plan.chosen_stages())
    yield Finding(
        "ok",
        f"{machine.configfile}: {len(plan.chosen_recipes)} checkpoints to compare, {len(plan.chosen_stages())} stages, "
        f"{made} of them made",
    )
    for warning in plan.warnings():
        yield Finding("warning", warning)
