"""GPU locks on a machine without a scheduler: two jobs never share a card.

Snakemake counts GPUs but does not assign them. Each card has a lock file that all users of the machine share; the kernel
releases a lock when its process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from mmpipe import slurm
from mmpipe.errors import MmpipeError

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
FOLDER = Path(tempfile.gettempdir(), "mmpipe-gpus")


def visible_devices() -> list[str]:
    """The cards this process may use, by number or name."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


@contextmanager
def locked_gpus(count: int, *, folder: Path = FOLDER, poll: float = 2.0) -> Iterator[None]:
    """Lock ``count`` GPUs, and hide all others, for as long as the block runs; waits until enough are free.

    Does nothing for ``count`` 0, and under Slurm, which assigns GPUs itself. Raises MmpipeError when there are fewer GPUs.
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
    with _locks(devices, count, folder, poll) as cards:
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
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # of another user, open to all
        folder.chmod(0o1777)
    waited = False
    while True:
        with ExitStack() as locks:
            cards: list[str] = []
            for device in devices:
                if len(cards) < count and (lock := _try_lock(folder, device)):
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


def _try_lock(folder: Path, device: str) -> IO[bytes] | None:
    path = folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', device)}.lock"
    file = path.open("ab")
    with contextlib.suppress(PermissionError):  # another user's file, open to all
        path.chmod(0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
