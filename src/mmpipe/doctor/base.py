"""The base of all checks: findings, and the examined machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

from mmpipe.errors import ConfigError
from mmpipe.plan.plan import Plan, StagePlan
from mmpipe.settings import read_mapping

Status = Literal["ok", "warning", "problem"]
_PROBE_SECONDS = 180
"""Importing torch from a loaded file server takes minutes at worst; a driver that hangs never ends."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: Status
    seen: str
    advice: str = ""
    """Advice."""
    topic: str = ""

    def about(self, topic: str) -> Finding:
        """The same finding under the name of its check."""
        return replace(self, topic=topic)


ok, warning, problem = (partial(Finding, status) for status in get_args(Status))


@dataclass(frozen=True)
class CommandResult:
    """Exit status of a command, None when it did not end in time; its standard output and standard error."""

    status: int | None
    text: str
    complaint: str


def profile_file(folder: Path) -> Path | None:
    """The file of a Snakemake profile's directory, as :mod:`snakemake.profiles` looks for it."""
    names = ("profile.yaml", "config.v9+.yaml", "config.yaml")
    return next((folder / name for name in names if (folder / name).is_file()), None)


class Machine:
    """The machine, the profile of the jobs, and the configuration, each read when first needed."""

    def __init__(
        self, root: Path = Path(), profile: str = "local", configfile: Path = Path("config/config.yaml")
    ) -> None:
        self.root = root
        self.profile = profile
        self.configfile = configfile

    def ask(self, *command: str, seconds: float = 10) -> CommandResult | None:
        """Run a command with a time limit; None when it is not installed."""
        if shutil.which(command[0]) is None:
            return None
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, errors="replace")
        except subprocess.TimeoutExpired:
            return CommandResult(None, "", f"no answer within {seconds:g} seconds")
        return CommandResult(done.returncode, done.stdout.strip(), done.stderr.strip())

    @cached_property
    def plan(self) -> Plan:
        """The plan of the configuration. Raises ConfigError."""
        return Plan(read_mapping(self.configfile), self.root, where=str(self.configfile))

    @cached_property
    def stages(self) -> list[StagePlan]:
        """The stages of the chosen recipes; none when the configuration cannot be read, which another check reports."""
        try:
            return self.plan.chosen_stages()
        except ConfigError:
            return []

    @cached_property
    def profile_folder(self) -> Path | None:
        """The profile's directory: a path, one of the project's, or one of the user's, as Snakemake looks for it."""
        root, name = self.root, self.profile
        folders = (root / name, root / "profiles" / name, Path.home() / ".config/snakemake" / name)
        return next((folder for folder in folders if profile_file(folder)), None)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The profile's settings; empty when there is none."""
        file = profile_file(self.profile_folder) if self.profile_folder else None
        return read_mapping(file) if file else {}

    @property
    def on_slurm(self) -> bool:
        """Whether the profile submits jobs to Slurm."""
        return self.settings.get("executor") == "slurm"

    @property
    def local_gpus(self) -> int:
        """GPUs of this machine that the profile offers to jobs."""
        resources = self.settings.get("resources")
        wanted = resources.get("gpu", 0) if isinstance(resources, dict) else 0
        return wanted if isinstance(wanted, int) else 1

    @cached_property
    def torch(self) -> Mapping[str, Any]:
        """PyTorch's version and GPUs (:mod:`mmpipe.doctor.probe`), or ``error``.

        Read in a process of its own: a driver that does not fit can hang or crash it.
        """
        command = (sys.executable, "-m", "mmpipe.doctor.probe")
        answer = self.ask(*command, seconds=_PROBE_SECONDS)
        if answer is None or answer.status != 0:
            lines = (answer.complaint if answer else "no Python").splitlines() or ["it ended without a word"]
            return {"error": lines[-1]}
        facts: dict[str, Any] = json.loads(answer.text.splitlines()[-1])
        return facts
