"""Saying in the log how a long download goes: bars are for terminals, and jobs write into files.

What grows is the folder. Looking at that serves every source alike, whoever carries the bytes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmpipe.sources.transfer.space import in_words

log = logging.getLogger(__name__)
EVERY = 60.0
"""Seconds between two lines."""


@contextmanager
def progress(folder: Path, what: str, total: Callable[[], float | None]) -> Iterator[None]:
    """While the block runs, log once a minute how many bytes are in ``folder``, of ``total()`` if known, and their rate."""
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
        came, size, since, then = size, bytes_in(folder), then, time.monotonic()
        rate = in_words(max(0, size - came) / (then - since))
        whole = total()
        share = f" of {in_words(whole)} ({min(size / whole, 1):.0%})" if whole else ""
        log.info("%s: %s%s are here, %s a second", what, in_words(size), share, rate)


def bytes_in(folder: Path) -> int:
    """The size of all files below a folder that may change meanwhile; links are not followed."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(place, name)).st_size
    return size
