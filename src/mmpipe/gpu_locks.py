"""GPU locks on a machine without a scheduler: two jobs never share a card.

Snakemake counts GPUs but does not assign them. Each card has a lock file in a folder that belongs to one user; the
kernel releases a lock when its process ends, however it ends. Users are not kept apart: a file that they share is one
that each could turn against the others.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from mmpipe import slurm
from mmpipe.errors import MmpipeError

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_devices() -> list[str]:
    """The cards this process may use, by number or name."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def lock_folder() -> Path:
    """The folder of this user's locks: in ``$XDG_RUNTIME_DIR`` where this user owns it, else in the temporary directory."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and os.path.isdir(runtime) and os.stat(runtime).st_uid == os.geteuid():
        return Path(runtime, "mmpipe-gpus")
    return Path(tempfile.gettempdir(), f"mmpipe-gpus-{os.geteuid()}")


@contextmanager
def locked_gpus(count: int, *, folder: Path | None = None, poll: float = 2.0) -> Iterator[None]:
    """Lock ``count`` GPUs, and hide all others, for as long as the block runs; waits until enough are free.

    Does nothing for ``count`` 0, and under Slurm, which assigns GPUs itself. Raises MmpipeError when there are fewer GPUs,
    or when the folder of the locks (default: :func:`lock_folder`) is not private.
    """
    if not count or slurm.job_id():
        yield
        return
    devices = visible_devices()
    if len(devices) < count:
        raise MmpipeError(
            f"the job was given {count} GPU(s), but this machine shows {len(devices)}; give Snakemake the true number "
            f"(--resources gpu={len(devices)}), install a CUDA build of torch, or run on the CPU with --profile local"
        )
    before = os.environ.get(VISIBLE)
    with _locks(devices, count, folder or lock_folder(), poll) as cards:
        log.info("using GPU %s", ", ".join(cards))
        os.environ[VISIBLE] = ",".join(cards)
        try:
            yield
        finally:
            os.environ.pop(VISIBLE)
            if before is not None:
                os.environ[VISIBLE] = before


@contextmanager
def _locks(devices: Sequence[str], count: int, folder: Path, poll: float) -> Iterator[list[str]]:
    waited = False
    while True:
        with ExitStack() as locks:
            cards: list[str] = []
            # a folder for each try: who cleans the temporary directory may have removed the last
            private = locks.enter_context(_private(folder))
            for device in devices:
                if len(cards) < count and (lock := _try_lock(private, device)):
                    locks.enter_context(lock)
                    cards.append(device)
            if len(cards) == count:
                yield cards
                return
        # all or none: two jobs that each hold a half would deadlock
        if not waited:
            log.info("waiting for %d free GPU(s) of %s", count, ", ".join(devices))
            waited = True
        time.sleep(poll)


@contextmanager
def _private(folder: Path) -> Iterator[int]:
    """Open a folder that this user alone can enter, made where it is missing. In the temporary directory anyone may have
    made one of this name: raises MmpipeError for a link, for another owner and for a mode that lets others in."""
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise MmpipeError(f"{folder}: no folder for the locks of GPUs ({error.strerror}); {_REMEDY}") from error
    try:
        facts = os.fstat(descriptor)
        if facts.st_uid != os.geteuid() or stat.S_IMODE(facts.st_mode) & 0o077:
            raise MmpipeError(
                f"{folder}: the folder of the locks of GPUs belongs to user {facts.st_uid} with mode "
                f"{stat.S_IMODE(facts.st_mode):o}, and must belong to user {os.geteuid()} with mode 700; {_REMEDY}"
            )
        yield descriptor
    finally:
        os.close(descriptor)


_REMEDY = "remove it, or set XDG_RUNTIME_DIR or TMPDIR to a folder of your own"


def _try_lock(folder: int, device: str) -> IO[bytes] | None:
    name = f"{re.sub(r'[^A-Za-z0-9-]', '_', device)}.lock"
    try:
        file = os.fdopen(
            os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder), "ab"
        )
    except OSError as error:
        raise MmpipeError(f"the lock {name} of a GPU cannot be opened ({error.strerror}); {_REMEDY}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
