"""The profile: whether it is there, whether Snakemake knows its keys, and how it asks for GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from mmpipe.doctor.base import Finding, Machine
from mmpipe.doctor.profiles import file_of, known_keys
from mmpipe.errors import ConfigError, did_you_mean


def check(machine: Machine) -> Iterator[Finding]:
    folder = machine.profile_folder
    if folder is None:
        known = {path.name for path in (machine.root / "profiles").glob("*") if file_of(path)}
        yield Finding("problem", f"there is no profile '{machine.profile}'{did_you_mean(machine.profile, known)}")
        return
    file = file_of(folder)
    # "__use_yte__" and "?if ..." are the template language's
    unknown = [key for key in machine.settings if key not in known_keys() and not key.startswith(("__", "?"))]
    for key in unknown:
        plugin = " (or the plugin that has it is not installed)" if key.startswith("slurm-") else ""
        yield Finding("problem", f"{file}: Snakemake has no option '{key}'{plugin}", _hint(key))
    yield from _gpus(machine, str(file))
    if not unknown:
        yield Finding("ok", f"{file}: {len(machine.settings)} settings, all known")


def _hint(key: str) -> str:
    return (
        did_you_mean(key, known_keys()).removeprefix("; ") if len(did_you_mean(key, known_keys())) < 80 else "remove it"
    )


def _gpus(machine: Machine, file: str) -> Iterator[Finding]:
    """The Slurm plugin refuses a job that asks for GPUs in two ways."""
    defaults = machine.settings.get("default-resources", {})
    asked = set(defaults) if isinstance(defaults, dict) else {str(line).partition("=")[0] for line in defaults}
    try:
        request = machine.plan.config.gpu_request
    except ConfigError:
        return
    other = {"gpu": "gres", "gres": "gpu"}[request]
    if other in asked:
        yield Finding(
            "problem",
            f"{file}: default-resources ask for '{other}', and jobs for '{request}' (gpu_request); the plugin refuses both",
            f"say `gpu_request: {other}` in {machine.configfile}, and remove '{other}' here: recipes say how many GPUs",
        )
