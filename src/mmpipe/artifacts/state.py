"""The undeclared directory in which a long step keeps its progress.

Snakemake deletes declared outputs when a job starts, fails or is killed, so checkpoints in progress live here. A
fingerprint ties them to what is being made: equal means resume, different means start afresh. A lock keeps two runs of
one step apart.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmpipe.artifacts.files import read_json, write_json
from mmpipe.errors import ArtifactError

_FINGERPRINT = "fingerprint.json"


@contextmanager
def open_state(path: Path, fingerprint: str) -> Iterator[bool]:
    """Hold the state directory; yields True when it carries progress of the same fingerprint.

    The lock is the kernel's: it vanishes with the process, however that ends. Raises ArtifactError when another live
    process holds it, naming that process.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.lock")
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ArtifactError(
                f"{path}: another run is working on this step ({file.read().strip() or 'holder unknown'}); "
                "wait for it or stop it, then run the same command again"
            ) from None
        file.truncate(0)
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
        }
        file.write(json.dumps(holder))
        file.flush()
        yield _resumable(path, fingerprint)


def _resumable(path: Path, fingerprint: str) -> bool:
    record = path / _FINGERPRINT
    if record.is_file() and read_json(record) == {"fingerprint": fingerprint}:
        return True
    shutil.rmtree(path)
    path.mkdir()
    write_json(record, {"fingerprint": fingerprint})
    return False
