"""What checks share: the finding they report, and the machine they look at."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

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
    """What to do about it."""
    topic: str = ""

    def about(self, topic: str) -> Finding:
        """The same finding under the name of its check."""
        return replace(self, topic=topic)


@dataclass(frozen=True)
class Answer:
    """What a command said. ``status`` is None when it did not end in time."""

    status: int | None
    text: str
    complaint: str


class Machine:
    """The machine, the profile jobs would run with, and the configuration, each looked at when first asked for."""

    def __init__(
        self, root: Path = Path(), profile: str = "local", configfile: Path = Path("config/config.yaml")
    ) -> None:
        self.root = root
        self.profile = profile
        self.configfile = configfile

    def ask(self, *command: str, seconds: float = 10) -> Answer | None:
        """Run a command with a time limit; None when it is not installed."""
        if shutil.which(command[0]) is None:
            return None
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, errors="replace")
        except subprocess.TimeoutExpired:
            return Answer(None, "", f"no answer within {seconds:g} seconds")
        return Answer(done.returncode, done.stdout.strip(), done.stderr.strip())

    @cached_property
    def plan(self) -> Plan:
        """The plan of the configuration. Raises ConfigError."""
        return Plan(read_mapping(self.configfile), self.root, where=str(self.configfile))

    @cached_property
    def stages(self) -> list[StagePlan]:
        """The stages of the chosen recipes; none when the configuration cannot be read, which is a finding of its own."""
        try:
            return self.plan.chosen_stages()
        except ConfigError:
            return []

    @cached_property
    def profile_folder(self) -> Path | None:
        """The profile's directory, where Snakemake looks for it."""
        from mmpipe.doctor.profiles import find

        return find(self.profile, self.root)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """What the profile says; empty when there is none."""
        from mmpipe.doctor.profiles import read

        return read(self.profile_folder) if self.profile_folder else {}

    @property
    def on_slurm(self) -> bool:
        """Whether the profile sends jobs to Slurm."""
        return self.settings.get("executor") == "slurm"

    @property
    def local_gpus(self) -> int:
        """GPUs of this machine that the profile hands out."""
        resources = self.settings.get("resources")
        wanted = resources.get("gpu", 0) if isinstance(resources, dict) else 0
        return wanted if isinstance(wanted, int) else 1

    @cached_property
    def torch(self) -> Mapping[str, Any]:
        """What PyTorch says about itself and its GPUs (:mod:`mmpipe.doctor.probe`).

        Asked in a process of its own: a driver that does not fit can hang or crash it. ``error`` says why it gave no answer.
        """
        command = (sys.executable, "-m", "mmpipe.doctor.probe")
        answer = self.ask(*command, seconds=_PROBE_SECONDS)
        if answer is None or answer.status != 0:
            lines = (answer.complaint if answer else "no Python").splitlines() or ["it ended without a word"]
            return {"error": lines[-1]}
        facts: dict[str, Any] = json.loads(answer.text.splitlines()[-1])
        return facts
