"""The state of Slurm jobs. Every query has a time limit; callers must handle a missing answer."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from datetime import datetime

from mmpipe.errors import MmpipeError

log = logging.getLogger(__name__)

_SECONDS = 20
"""Time limit of a query; a loaded controller is slow, a stopped one never answers."""
_GONE = "Invalid job id"


def job_id() -> str | None:
    """The Slurm job this process runs in."""
    return os.environ.get("SLURM_JOB_ID")


def state(job: str) -> str | None:
    """A job's state (``RUNNING``, ``PENDING``, ...), ``GONE`` when Slurm does not know it, None without an answer."""
    return _ask("squeue", "--noheader", "--jobs", job, "--format=%T")


def end_time(job: str) -> float | None:
    """The end of the job's time limit, in seconds since the epoch; None without a limit or an answer."""
    answer = _ask("squeue", "--noheader", "--jobs", job, "--format=%e")
    try:
        return datetime.fromisoformat(answer or "").timestamp()
    except ValueError:  # N/A, UNLIMITED, GONE
        return None


def hosts(job: str, patience: float = 300) -> tuple[str, ...]:
    """The names of the job's nodes, first one first.

    Raises MmpipeError when the controller does not answer within ``patience`` seconds.
    """
    until = time.monotonic() + patience
    while True:
        nodes = _ask("squeue", "--noheader", "--jobs", job, "--format=%N")
        names = _ask("scontrol", "show", "hostnames", nodes) if nodes else None
        if names:
            return tuple(names.split())
        if time.monotonic() > until:
            raise MmpipeError(
                f"Slurm does not say which nodes job {job} has: the controller does not answer (try: scontrol ping). "
                "Run the same command again when it does; nothing is lost"
            )
        time.sleep(min(10, patience / 10))


def requeue(job: str) -> bool:
    """Put a running batch job back into the queue, which ends it; False when Slurm refuses."""
    return _ask("scontrol", "requeue", job) is not None


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("Slurm gave no answer: %s", error)
        return None
    if _GONE in done.stderr or (command[0] == "squeue" and done.returncode == 0 and not done.stdout.strip()):
        return "GONE"
    if done.returncode:
        log.warning("%s: %s", " ".join(command), done.stderr.strip())
        return None
    return done.stdout.strip()
