"""``mmpipe why``: the jobs that Snakemake would run, and why."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mmpipe.errors import MmpipeError, few
from mmpipe.provenance.records import flat

_JOB = re.compile(r"^(?:local)?(?:rule|checkpoint|Job) ?\S*: ?(?P<message>.*)$")
_REASON = re.compile(r"^\s*[Rr]eason: (?P<reason>.*)$")


def snakemake_command(targets: list[str], configfile: Path | None) -> list[str]:
    """The command that makes ``targets``; they come first, because options that take many values would swallow them."""
    config = ["--configfile", str(configfile)] if configfile else []
    return [sys.executable, "-m", "snakemake", *targets, *config]


def explain(targets: list[str], configfile: Path | None = None) -> str:
    """The jobs a dry run lists, each with its reason in words.

    Raises MmpipeError with Snakemake's own message when the plan cannot be made.
    """
    command = [*snakemake_command(targets, configfile), "--dry-run", "--cores", "1", "--nolock", "--nocolor"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise MmpipeError(_complaint(result.stdout + result.stderr))
    jobs = _jobs(result.stdout + result.stderr)
    if not jobs:
        return f"Nothing to do: {', '.join(targets)} is up to date."
    lines = [f"{len(jobs)} job(s) would run for {', '.join(targets)}:"]
    for message, reason in jobs:
        lines.append(f"\n* {message}")
        lines += [f"    {line}" for line in _in_words(reason)]
    return "\n".join(lines)


def _complaint(output: str) -> str:
    """The message of Snakemake's error, without the places in its files."""
    _, _, message = output.rpartition("WorkflowError")
    _, _, message = message.partition(":\n") if message else ("", "", output)
    lines = [line for line in message.splitlines() if line.strip() and not line.startswith(("  File ", "Using "))]
    return "\n".join(lines) or output.strip()


def _jobs(output: str) -> list[tuple[str, str]]:
    """``(message, reason)`` of every job of a dry run."""
    jobs, message = [], ""
    for line in output.splitlines():
        if found := _REASON.match(line):
            jobs.append((message, found["reason"]))
        elif found := _JOB.match(line):
            message = found["message"]
    return jobs


def _in_words(reason: str) -> list[str]:
    lines = []
    parts = re.split(r"; (?=[A-Z])", reason)
    for part in parts:
        what, _, details = part.partition(": ")
        names = [name.strip() for name in details.split(",")]
        match what:
            case "Missing output files" if len(parts) > 1:
                continue  # the other reason says more; temporary files are always missing
            case "Missing output files":
                lines.append(f"{few(names)} {'are' if len(names) > 1 else 'is'} not there")
            case "Input files updated by another job":
                lines.append(f"made from what will be made first: {few(names)}")
            case "Updated input files":
                lines.append(f"changed since: {few(names)}")
            case "Set of input files has changed since last execution":
                lines.append("it is made from other files than last time")
            case "Params have changed since last execution":
                lines += _changed_settings(details)
            case "Forced execution":
                lines.append("asked for on the command line")
            case _:
                lines.append(part)
    return lines


def _changed_settings(details: str) -> list[str]:
    """Named differences between the two specs that Snakemake prints."""
    specs = [json.loads(text) for text in _json_objects(details)]
    if len(specs) != 2:
        # what a record or a manifest proves is words already
        return [f"its settings changed: {details}" if details.startswith("Union") else details]
    before, now = (dict(flat(spec)) for spec in specs)
    changes = [
        f"{key}: {_shown(before, key)} -> {_shown(now, key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, ...) != now.get(key, ...)
    ]
    return [f"setting changed: {change}" for change in changes] or ["its settings changed"]


def _json_objects(text: str) -> list[str]:
    """The JSON objects in a text, one after the other."""
    decoder = json.JSONDecoder()
    found, start = [], text.find("{")
    while start >= 0:
        try:
            _, length = decoder.raw_decode(text[start:])
        except json.JSONDecodeError:
            start = text.find("{", start + 1)
            continue
        found.append(text[start : start + length])
        start = text.find("{", start + length)
    return found


def _shown(spec: dict[str, Any], key: str) -> str:
    return json.dumps(spec[key]) if key in spec else "(default)"
