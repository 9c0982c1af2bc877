"""The state directory: undeclared progress of a long step.

Snakemake deletes declared outputs when a job starts, fails or is killed, so checkpoints in progress live here. A
fingerprint identifies their step and inputs: equal means resume, different means start afresh. A lock keeps two runs of
one step apart.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mmpipe import slurm
from mmpipe.artifacts.files import read_json, write_json
from mmpipe.errors import ArtifactError

_FINGERPRINT = "fingerprint.json"


@contextmanager
def open_state(path: Path, fingerprint: str) -> Iterator[bool]:
    """Lock the state directory; yields True when it has progress of the same fingerprint.

    The lock is the kernel's: it vanishes with the process, however that ends. Where a file system does not carry locks
    from one machine to another, Slurm is asked about the last holder. Raises ArtifactError when another live process
    holds it, naming that process and how to end it.
    """
    path.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"{path}: {_who_works(file, _holder(file))}") from None
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
            raise ArtifactError(f"{path}: {_who_works(file, last)}")
        _write_holder(file)
        try:
            yield _resumable(path, fingerprint)
        finally:
            file.truncate(0)


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
