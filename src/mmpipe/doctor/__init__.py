"""What is wrong with this machine, before a job finds out: small checks, one a file in ``mmpipe.doctor.checks``."""

from __future__ import annotations

from mmpipe import registry
from mmpipe.doctor.base import Finding, Machine
from mmpipe.errors import MmpipeError


def examine(machine: Machine) -> list[Finding]:
    """Run every check; one that cannot be carried out is a problem of its own, and the others go on."""
    findings: list[Finding] = []
    for name, module in registry.modules("mmpipe.doctor.checks").items():
        topic = name.replace("_", " ")
        try:
            findings += [finding.about(topic) for finding in module.check(machine)]
        except MmpipeError as error:
            findings.append(Finding("problem", str(error), topic=topic))
    return findings
