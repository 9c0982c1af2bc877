"""Operators that PyTorch compiles on this machine: where they are kept, and a lock that ends with its process."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)


def build_directory() -> Path:
    """Where DeepSpeed's operators are compiled: one folder for each Python, torch, DeepSpeed, environment and machine, as
    they are compiled for its processor."""
    import torch

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    base = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    if base.parent.name == "mmpipe":  # set by guard_builds
        return base
    version = importlib.metadata.version("deepspeed") if importlib.util.find_spec("deepspeed") else ""
    environment = hashlib.sha256(f"{sys.prefix} {version}".encode()).hexdigest()[:8]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    key = f"{python}-torch{torch.__version__}-{environment}-{platform.machine()}-{platform.node()}"
    return base / "mmpipe" / key


def guard_builds(meanwhile: Callable[[], None]) -> None:
    """Compile DeepSpeed's operators in :func:`build_directory`, under a lock that ends with its process.

    torch's own lock is a file that a killed process leaves behind, and for which others wait for ever. While this
    process waits for another that compiles, it calls ``meanwhile``, which may raise.
    """
    from torch.utils import cpp_extension

    os.environ["TORCH_EXTENSIONS_DIR"] = str(build_directory())
    replaced: Any = cpp_extension
    replaced.FileBaton = lambda path, **_: BuildLock(Path(path), meanwhile)


class BuildLock:
    """torch's ``FileBaton`` with a lock of the kernel. Each process builds in its turn: ninja leaves what is built, and
    finishes what a killed one began."""

    def __init__(self, path: Path, meanwhile: Callable[[], None]) -> None:
        self._torchs = path
        self._meanwhile = meanwhile
        self._file: IO[str] | None = None

    def try_acquire(self) -> bool:
        """Wait for the lock; always true."""
        self._file = self._torchs.with_name("mmpipe.lock").open("a+")
        told = False
        while not _flocked(self._file):
            if not told:
                self._file.seek(0)
                log.info("waiting for process %s, which compiles in %s", self._file.read(), self._torchs.parent)
                told = True
            self._meanwhile()
            time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        self._torchs.unlink(missing_ok=True)  # of a torch that did not know this lock
        return True

    def release(self) -> None:
        """Give the lock up."""
        if self._file:
            self._file.close()


def _flocked(file: IO[str]) -> bool:
    """Whether the lock was taken, or the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        log.warning("%s: this file system has no locks; processes may compile at the same time", file.name)
    return True
