"""Diagnosis of this machine before jobs run, by the checks in ``mmpipe.doctor.checks``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mmpipe import registry
from mmpipe.doctor.base import Finding, Machine
from mmpipe.errors import MmpipeError


def all_checks() -> dict[str, Callable[[Machine], Iterator[Finding]]]:
    """Every check by its topic: the functions ``check_topic`` of the modules of ``mmpipe.doctor.checks``."""
    modules = registry.modules("mmpipe.doctor.checks").values()
    found = {name: check for module in modules for name, check in vars(module).items() if name.startswith("check_")}
    return {name.removeprefix("check_").replace("_", " "): found[name] for name in sorted(found)}


def examine(machine: Machine) -> list[Finding]:
    """Run every check; one that fails is reported as a problem, and the others continue."""
    findings: list[Finding] = []
    for topic, check in all_checks().items():
        try:
            findings += [finding.about(topic) for finding in check(machine)]
        except MmpipeError as error:
            findings.append(Finding("problem", str(error), topic=topic))
    return findings
