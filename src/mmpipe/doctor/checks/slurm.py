"""Slurm: whether the controller answers, and whether it has the hardware of the recipes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmpipe.doctor.base import Finding, Machine, ok, problem


@dataclass(frozen=True)
class Partition:
    """A line of sinfo."""

    name: str
    default: bool
    minutes: float
    """Longest time limit of a job."""
    gpus: int
    """GPUs of its best node."""


def check_slurm(machine: Machine) -> Iterator[Finding]:
    severe = machine.on_slurm
    if severe and importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        yield problem("Snakemake's plugin for Slurm is not installed", "pip install 'mmpipe[slurm]'")
    ping = machine.ask("scontrol", "ping")
    if ping is None:
        here = ok("no Slurm on this machine")
        hint = "run on the cluster's login node, or use another --profile"
        yield problem(here.seen, hint) if severe else here
        return
    if ping.status != 0 or "UP" not in ping.text:
        said = (ping.complaint or ping.text or "no answer").splitlines()[-1]
        yield Finding(
            "problem" if severe else "warning", f"the controller does not answer: {said}", "try: scontrol ping"
        )
        return
    answer = machine.ask("sinfo", "--noheader", "--format=%P|%l|%G|%a")
    if answer is None or answer.status != 0:
        yield Finding("problem" if severe else "warning", "sinfo gives no answer", "try: sinfo")
        return
    partitions = read_partitions(answer.text)
    if not partitions:
        yield Finding(
            "problem" if severe else "warning", "no partition is up", "ask the cluster's administrator: sinfo"
        )
        return
    yield ok("; ".join(f"{p.name}{'*' if p.default else ''}: {p.gpus} GPUs a node" for p in partitions))
    if severe:
        yield from _status(machine)
        yield from _fits(machine, partitions)


def read_partitions(text: str) -> list[Partition]:
    """The partitions of ``sinfo --format=%P|%l|%G|%a`` that are up; one with several kinds of nodes has several lines."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        name, limit, gres, state = line.strip().split("|")
        if state != "up":
            continue
        plain = name.rstrip("*")
        before = found.get(plain)
        gpus = max(_gpus(gres), before.gpus if before else 0)
        found[plain] = Partition(plain, name.endswith("*"), _minutes(limit), gpus)
    return list(found.values())


def _gpus(gres: str) -> int:
    """``gpu:a100:8(S:0-1),nvme:1`` has 8."""
    entries = [entry.partition("(")[0].split(":") for entry in gres.split(",")]
    counts = [entry[-1] for entry in entries if entry[0] == "gpu"]
    return sum(int(count) if count.isdigit() else 1 for count in counts)


def _minutes(limit: str) -> float:
    """Slurm's ``days-hours:minutes:seconds`` (or ``minutes:seconds``) in minutes."""
    if limit in ("infinite", "n/a", "UNLIMITED"):
        return float("inf")
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes, seconds = [0] * (3 - len(parts)) + parts
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def _status(machine: Machine) -> Iterator[Finding]:
    """The command that Snakemake asks for the state of jobs."""
    command = machine.settings.get("slurm-status-command", "sacct")
    answer = machine.ask(str(command), "--noheader")
    if answer is None or answer.status != 0:
        said = (answer.complaint or f"status {answer.status}").splitlines()[-1] if answer else "not installed"
        yield problem(f"{command}: {said}", "say `slurm-status-command: squeue` in the profile")


def _fits(machine: Machine, partitions: list[Partition]) -> Iterator[Finding]:
    """The partition jobs go to against the hardware of the chosen stages."""
    defaults: Any = machine.settings.get("default-resources") or {}
    wanted = str(defaults.get("slurm_partition", "")) if isinstance(defaults, dict) else ""
    names = {partition.name: partition for partition in partitions}
    if wanted and wanted not in names:
        yield problem(f"there is no partition '{wanted}'", f"there are: {', '.join(names)}")
        return
    chosen = names.get(wanted) or next((partition for partition in partitions if partition.default), None)
    if chosen is None:
        yield problem("there is no default partition", "name one in the profile: slurm_partition")
        return
    for stage in machine.stages:
        hardware = stage.settings.hardware
        each = hardware.gpus // machine.plan.nodes(hardware)
        if each > chosen.gpus:
            yield problem(
                f"{stage.id} asks for {each} GPUs a node, partition '{chosen.name}' has {chosen.gpus}",
                f"set gpus_per_node in {machine.configfile}, or name another partition in the profile (slurm_partition)",
            )
        if hardware.runtime_minutes > chosen.minutes:
            yield problem(
                f"{stage.id} asks for {hardware.runtime_minutes} minutes, partition '{chosen.name}' allows {chosen.minutes:.0f}",
                "lower hardware.runtime_minutes: a training goes on in the next job",
            )
