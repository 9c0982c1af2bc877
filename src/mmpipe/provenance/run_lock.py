"""One run at a time works on a file, in whatever clone, on whatever machine.

Snakemake's own lock lies in the working directory: a second clone on the same results does not see it, and that of a
killed run stays until somebody removes it. This one lies beside the results, and the kernel holds it: it ends with the
process, however that ends.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from mmpipe.errors import ArtifactError
from mmpipe.provenance.records import HOME

ROOTS = (Path("results"), Path("resources"))
"""The folders with outputs of the workflow; each may be a link to one that other clones share."""
_ENDED = "ended"


class RunLock:
    """The lock of one run of Snakemake, made before it looks at any file."""

    def __init__(self) -> None:
        self._ended = {root: _last_run(root) for root in ROOTS}

    def conflict(self, reading: set[str], writing: set[str]) -> str | None:
        """Who works on the same files, in words; None when nobody does."""
        return next((who for root in ROOTS for who in _conflicts(root, reading, writing)), None)

    @contextmanager
    def held(self, reading: set[str], writing: set[str]) -> Iterator[None]:
        """Hold the lock. Raises ArtifactError when another live run reads what this one writes, or writes what it reads,
        or has ended since this one looked at the files."""
        if not writing:
            yield
            return
        with ExitStack() as stack:
            for root in ROOTS:
                stack.enter_context(_held(root, reading, writing))
            for root, before in self._ended.items():
                if (now := _last_run(root)) != before and set(now["writing"]) & (reading | writing):
                    raise ArtifactError("another run ended while this one was planned; run the same command again")
            yield

    @staticmethod
    def remove_all() -> None:
        """Remove all locks, those of live processes too."""
        for root in ROOTS:
            for file in (root / HOME / "locks").glob("*.json"):
                file.unlink(missing_ok=True)


def _last_run(root: Path) -> dict[str, Any]:
    """The run that ended last; it wrote nothing when none did."""
    try:
        return {"writing": []} | _facts((root / HOME / "locks" / _ENDED).read_text())
    except OSError:
        return {"writing": []}


def _facts(text: str) -> dict[str, Any]:
    """What a run wrote about itself; empty when it was killed while writing."""
    try:
        facts = json.loads(text)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


@contextmanager
def _held(root: Path, reading: set[str], writing: set[str]) -> Iterator[None]:
    folder = root / HOME / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{socket.gethostname()}-{os.getpid()}.json"
    with (folder / "mutex").open("a") as mutex:
        fcntl.flock(mutex, fcntl.LOCK_EX)
        if who := next(_conflicts(root, reading, writing), None):
            raise ArtifactError(who)
        file = path.open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump(_self() | {"reading": sorted(reading), "writing": sorted(writing)}, file)
        file.flush()
    with file:
        try:
            yield
        finally:
            (folder / _ENDED).write_text(json.dumps(_self() | {"writing": sorted(writing)}))
            path.unlink(missing_ok=True)


def _self() -> dict[str, Any]:
    since = datetime.now().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "user": getpass.getuser(), "since": since}


def _conflicts(root: Path, reading: set[str], writing: set[str]) -> Iterator[str]:
    for path in sorted((root / HOME / "locks").glob("*.json")):
        try:
            with path.open("r+") as file:
                holder = _holder(path, file)
        except OSError:  # its run has just ended
            continue
        if holder is None:
            continue
        theirs = set(holder.get("writing", ()))
        shared = sorted((theirs & (reading | writing)) | (set(holder.get("reading", ())) & writing))
        if shared or not theirs:
            yield _who(path, holder, shared)


def _holder(path: Path, file: IO[str]) -> dict[str, Any] | None:
    """The run that holds a lock; None, and the lock is gone, when its process is dead on this machine."""
    holder = _facts(file.read())
    elsewhere = holder.get("host", socket.gethostname()) != socket.gethostname()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return holder
    if elsewhere:  # not every file system carries locks from one machine to another
        return holder
    path.unlink(missing_ok=True)
    return None


def _who(path: Path, holder: dict[str, Any], shared: list[str]) -> str:
    who = f"process {holder.get('pid', '?')} of {holder.get('user', '?')} on {holder.get('host', '?')}"
    what = f" ({shared[0]}{' and others' if len(shared) > 1 else ''})" if shared else ""
    return (
        f"another run works on the same files{what}: {who}, since {holder.get('since', '?')}; wait for it or stop it, then "
        f"run the same command again. If that process is gone, delete {path}"
    )
