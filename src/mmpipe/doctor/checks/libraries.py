"""Installed libraries against what the project needs and the versions it was tested with."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mmpipe.doctor.base import Finding, Machine
from mmpipe.doctor.project import project

LOCK = Path("envs/requirements.lock")
_INSTALL = f"pip install -r {LOCK}"
_SHOWN = 6


def check(machine: Machine) -> Iterator[Finding]:
    needed = [Requirement(line) for line in project(machine.root).get("dependencies", [])]
    pins = _pins(machine.root / LOCK)
    if not needed or not pins:
        yield Finding(
            "warning", f"no pyproject.toml or no {LOCK} in {machine.root.absolute()}", "run it in the project"
        )
        return
    unfit = [problem for requirement in needed if (problem := _problem(requirement))]
    for problem in unfit:
        yield Finding("problem", problem, _INSTALL)
    direct = {canonicalize_name(requirement.name) for requirement in needed}
    other = [
        f"{name} {found} (tested with {pins[name]})"
        for name in sorted(direct & set(pins))
        if (found := _installed(name)) and Version(found).public != Version(pins[name]).public
    ]
    if other:
        yield Finding("warning", _few(other), f"results may differ in the last digits; {_INSTALL}")
    elif not unfit:
        yield Finding("ok", f"{len(direct)} libraries as in {LOCK}")


def _problem(requirement: Requirement) -> str | None:
    found = _installed(requirement.name)
    if found is None:
        return f"{requirement.name} is not installed"
    return (
        None
        if requirement.specifier.contains(found, prereleases=True)
        else f"{requirement.name} {found}, needs {requirement.specifier}"
    )


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pins(lock: Path) -> dict[str, str]:
    lines = lock.read_text(encoding="utf-8").splitlines() if lock.is_file() else []
    pairs = (line.partition("#")[0].strip().split("==") for line in lines if "==" in line.partition("#")[0])
    return {canonicalize_name(name): version for name, version in pairs}


def _few(lines: list[str]) -> str:
    rest = len(lines) - _SHOWN
    return ", ".join(lines[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
