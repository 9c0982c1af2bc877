"""Free disk space before a transfer, and its progress as log lines, as jobs write into files.

Progress is the growth of the folder, for every source alike.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmpipe.errors import DataError

log = logging.getLogger(__name__)
EVERY = 60.0
"""Seconds between two lines."""
_MARGIN = 256 * 1024**2
"""Bytes to leave free."""


def check_space(folder: Path, needed: float, what: str) -> None:
    """Raise DataError when about ``needed`` bytes do not fit below ``folder``."""
    free = shutil.disk_usage(folder).free
    if needed and needed + _MARGIN > free:
        raise DataError(
            f"{what}: needs {format_size(needed)} below {folder}, where {format_size(free)} are free; "
            "free some space, or make that folder a link to a larger disk"
        )


def format_size(size: float) -> str:
    """A readable number of bytes: ``18.4 GB``."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


@contextmanager
def progress(folder: Path, what: str, total: Callable[[], float | None]) -> Iterator[None]:
    """Context manager that logs once a minute the bytes in ``folder``, of ``total()`` if known, and their rate."""
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder, what, total, over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _watch(folder: Path, what: str, total: Callable[[], float | None], over: threading.Event) -> None:
    size, then = bytes_in(folder), time.monotonic()
    while not over.wait(EVERY):
        before, size, since, then = size, bytes_in(folder), then, time.monotonic()
        rate = format_size(max(0, size - before) / (then - since))
        whole = total()
        share = f" of {format_size(whole)} ({min(size / whole, 1):.0%})" if whole else ""
        log.info("%s: %s%s are here, %s a second", what, format_size(size), share, rate)


def bytes_in(folder: Path) -> int:
    """The size of all files below a folder that may change meanwhile; links are not followed."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(place, name)).st_size
    return size
