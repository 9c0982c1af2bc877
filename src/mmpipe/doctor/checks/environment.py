"""Python, libraries, configuration and profile."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from mmpipe.doctor.base import Finding, Machine, ok, problem, profile_file, warning
from mmpipe.errors import ConfigError, did_you_mean, few


def project(root: Path) -> dict[str, Any]:
    """The table ``[project]``; empty where the project's sources are not beside the configuration."""
    file = root / "pyproject.toml"
    if not file.is_file():
        return {}
    table: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    return table


def check_python(machine: Machine) -> Iterator[Finding]:
    """The version of Python."""
    wanted, found = project(machine.root).get("requires-python", ""), platform.python_version()
    if found not in SpecifierSet(wanted, prereleases=True):
        yield problem(f"Python {found}, needs {wanted}", "make an environment with a newer Python")
    else:
        yield ok(f"Python {found} ({sys.executable})")


LOCK = Path("envs/requirements.lock")
_INSTALL = f"pip install -r {LOCK}"
_SHOWN = 6


def check_libraries(machine: Machine) -> Iterator[Finding]:
    """Installed libraries against what the project needs and the versions it was tested with."""
    needed = [Requirement(line) for line in project(machine.root).get("dependencies", [])]
    pins = _pins(machine.root / LOCK)
    if not needed or not pins:
        yield warning(f"no pyproject.toml or no {LOCK} in {machine.root.absolute()}", "run it in the project")
        return
    unfit = [reason for requirement in needed if (reason := _unfit(requirement))]
    for reason in unfit:
        yield problem(reason, _INSTALL)
    direct = {canonicalize_name(requirement.name) for requirement in needed}
    other = [
        f"{name} {found} (tested with {pins[name]})"
        for name in sorted(direct & set(pins))
        if (found := _installed(name)) and Version(found).public != Version(pins[name]).public
    ]
    if other:
        yield warning(few(other, _SHOWN), f"results may differ in the last digits; {_INSTALL}")
    elif not unfit:
        yield ok(f"{len(direct)} libraries as in {LOCK}")


def _unfit(requirement: Requirement) -> str | None:
    found = _installed(requirement.name)
    if found is None:
        return f"{requirement.name} is not installed"
    fits = requirement.specifier.contains(found, prereleases=True)
    return None if fits else f"{requirement.name} {found}, needs {requirement.specifier}"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pins(lock: Path) -> dict[str, str]:
    lines = lock.read_text(encoding="utf-8").splitlines() if lock.is_file() else []
    pairs = (line.partition("#")[0].strip().split("==") for line in lines if "==" in line.partition("#")[0])
    return {canonicalize_name(name): version for name, version in pairs}


def check_configuration(machine: Machine) -> Iterator[Finding]:
    """The validity of the configuration."""
    plan = machine.plan  # raises ConfigError with all errors
    made = sum(stage.manifest().is_file() for stage in plan.chosen_stages())
    yield ok(
        f"{machine.configfile}: {len(plan.chosen_recipes)} checkpoints to compare, {len(plan.chosen_stages())} stages, "
        f"{made} of them made"
    )
    yield from map(warning, plan.warnings())


def check_profile(machine: Machine) -> Iterator[Finding]:
    """The profile: whether it exists, whether Snakemake knows its keys, and how it requests GPUs."""
    folder = machine.profile_folder
    if folder is None:
        known = {path.name for path in (machine.root / "profiles").glob("*") if profile_file(path)}
        yield problem(f"there is no profile '{machine.profile}'{did_you_mean(machine.profile, known)}")
        return
    file = profile_file(folder)
    # "__use_yte__" and "?if ..." are of the template language
    unknown = [key for key in machine.settings if key not in known_keys() and not key.startswith(("__", "?"))]
    for key in unknown:
        plugin = " (or the plugin that has it is not installed)" if key.startswith("slurm-") else ""
        hint = did_you_mean(key, known_keys()).removeprefix("; ")
        advice = hint if len(hint) < 78 else "remove it"
        yield problem(f"{file}: Snakemake has no option '{key}'{plugin}", advice)
    yield from _gpus(machine, str(file))
    if not unknown:
        yield ok(f"{file}: {len(machine.settings)} settings, all known")


@cache
def known_keys() -> frozenset[str]:
    """Every option of Snakemake and of its installed plugins, the keys a profile may have."""
    from snakemake.cli import get_argument_parser

    actions = get_argument_parser()._actions
    return frozenset(
        option.lstrip("-") for action in actions for option in action.option_strings if option.startswith("--")
    )


def _gpus(machine: Machine, file: str) -> Iterator[Finding]:
    """GPUs requested in two ways, which the Slurm plugin refuses."""
    defaults = machine.settings.get("default-resources", {})
    asked = set(defaults) if isinstance(defaults, dict) else {str(line).partition("=")[0] for line in defaults}
    try:
        request = machine.plan.config.gpu_request
    except ConfigError:
        return
    other = {"gpu": "gres", "gres": "gpu"}[request]
    if other in asked:
        yield problem(
            f"{file}: default-resources ask for '{other}', and jobs for '{request}' (gpu_request); the plugin refuses both",
            f"say `gpu_request: {other}` in {machine.configfile}, and remove '{other}' here: recipes say how many GPUs",
        )
