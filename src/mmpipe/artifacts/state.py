"""The state directory: undeclared progress of a long step.

Snakemake deletes declared outputs when a job starts, fails or is killed, so checkpoints in progress live here. A
fingerprint identifies their step and inputs: equal means resume, different means start afresh. A lock keeps two runs of
one step apart.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mmpipe import slurm
from mmpipe.artifacts.files import DamagedJson, read_json, read_object, write_json
from mmpipe.errors import ArtifactError

log = logging.getLogger(__name__)

_FINGERPRINT = "fingerprint.json"
RUNNING = "running.json"
"""File in the state directory while a training runs, with its process."""
COMPLETE = "complete"
"""The mark of a checkpoint in progress whose files are all there."""


@contextmanager
def open_state(path: Path, fingerprint: str) -> Iterator[bool]:
    """Lock the state directory; yields True when it has progress of the same fingerprint.

    Raises ArtifactError when another live process holds it, naming that process and how to end it.
    """
    path.mkdir(parents=True, exist_ok=True)
    with only_worker(path):
        yield _resumable(path, fingerprint)


@contextmanager
def only_worker(path: Path, patience: float = 0) -> Iterator[bool]:
    """Lock ``{path}.lock``, waiting ``patience`` seconds for another process; yields whether it waited.

    The lock is the kernel's: it vanishes with the process, however that ends. Where a file system does not carry locks
    from one machine to another, Slurm is asked about the last holder. Raises ArtifactError when another live process
    still holds it, naming that process and how to end it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + patience
    waited = False
    with path.with_name(f"{path.name}.lock").open("a+") as file:
        while holder := _other_worker(path, file):
            if time.monotonic() >= until:
                raise ArtifactError(f"{path}: {holder}")
            if not waited:
                log.warning("%s: %s; waiting for it up to %d s", path, holder, patience)
            waited = True
            time.sleep(1)
        _write_holder(file)
        try:
            yield waited
        finally:
            file.truncate(0)


def _other_worker(path: Path, file: IO[str]) -> str | None:
    """Take the lock; or who else has it, in words."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _who_works(file, _holder(file))
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise ArtifactError(
            f"{path}: this file system has no file locks ({error.strerror}); mount it with them (Lustre: -o "
            "flock), or let 'results' be a link to another one"
        ) from error
    last = _holder(file)
    job = last.get("slurm_job")
    if job and job != slurm.job_id() and slurm.state(job) == "RUNNING":
        return _who_works(file, last)
    return None


def _holder(file: IO[str]) -> dict[str, Any]:
    """Host, process and Slurm job of the last holder of the lock, as it wrote them."""
    file.seek(0)
    try:
        return dict(json.loads(file.read() or "{}"))
    except json.JSONDecodeError:  # it was killed while writing
        return {}


def _write_holder(file: IO[str]) -> None:
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "slurm_job": slurm.job_id()}))
    file.flush()


def _who_works(file: IO[str], holder: dict[str, Any]) -> str:
    """The message about the holder of the lock: whether it is alive, and what to do."""
    again = "then run the same command again"
    if not holder:
        return f"another run is working on this step; wait for it or stop it, {again}"
    who = f"process {holder['pid']} on {holder['host']}"
    job = holder.get("slurm_job")
    if not job:
        return (
            f"another run is working on this step: {who} (a Snakemake that was killed can leave its jobs running); "
            f"wait for it, or stop it (kill {holder['pid']}), {again}"
        )
    state = slurm.state(job)
    if state == "GONE":
        return (
            f"the lock of {who} is left over: Slurm does not know its job {job} any more. A file server notices a lost "
            f"node after some minutes; if the lock stays, delete {file.name}, {again}"
        )
    return (
        f"another run is working on this step: Slurm job {job} ({state or 'Slurm does not answer'}), {who}; wait for "
        f"it, or stop it (scancel {job}), {again}"
    )


def _resumable(path: Path, fingerprint: str) -> bool:
    record = path / _FINGERPRINT
    if record.is_file() and read_json(record) == {"fingerprint": fingerprint}:
        return True
    shutil.rmtree(path)
    path.mkdir()
    write_json(record, {"fingerprint": fingerprint})
    return False


def drop_progress(model: Path) -> None:
    """Remove the checkpoints in progress of a stage whose published directory ``model`` was accepted by the workflow.

    Their marks first: a kill in between must not leave an incomplete one that looks complete.
    """
    if model.name != "model":
        return
    checkpoints = model.with_name("state") / "checkpoints"
    for mark in checkpoints.glob(f"checkpoint-*/{COMPLETE}"):
        mark.unlink()
    shutil.rmtree(checkpoints, ignore_errors=True)


@contextmanager
def noticing_a_kill(state_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Leave a mark in the state directory while the block runs; ``say`` it when the last run left its own.

    A process that is killed (SIGKILL: out of memory, a person) cannot say anything itself.
    """
    mark = state_dir / RUNNING
    now = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "boot": _read_proc("sys/kernel/random/boot_id"),
        **_oom_kills(),
    }
    if mark.is_file():
        with suppress(DamagedJson):
            say(_last_end(read_object(mark), now))
    write_json(mark, now)
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def _last_end(last: dict[str, Any], now: dict[str, Any]) -> str:
    """What ended a run that left its mark."""
    who = f"process {last.get('process')} on {last.get('host')}"
    if last.get("host") != now["host"]:
        why = "killed (kill -9, out of memory), or its machine went down"
    elif last.get("boot") != now["boot"]:
        why = "ended with its machine, which was started again since"
    elif last.get("oom_kills", 0) < now.get("oom_kills", 0):
        why = (
            "killed, most likely because the machine ran out of memory: raise hardware.memory_gb, or lower hardware.workers "
            "or micro_batch"
        )
    else:
        why = "killed (kill -9)"
    return f"the last run of this training ({who}) was {why}; it goes on from its last checkpoint"


def _read_proc(name: str) -> str:
    try:
        return Path("/proc", name).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _oom_kills() -> dict[str, int]:
    """How often Linux has killed a process for memory since this machine was started."""
    found = re.search(r"^oom_kill (\d+)$", _read_proc("vmstat"), re.M)
    return {"oom_kills": int(found[1])} if found else {}
