"""Looking at the room on the disk before filling it."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmpipe.errors import DataError

_MARGIN = 256 * 1024**2
"""Bytes that stay free for everything else."""


def check_space(folder: Path, needed: float, what: str) -> None:
    """Raise DataError when ``needed`` bytes, more or less, do not fit below ``folder``."""
    free = shutil.disk_usage(folder).free
    if needed and needed + _MARGIN > free:
        raise DataError(
            f"{what}: needs {in_words(needed)} below {folder}, where {in_words(free)} are free; "
            "free some space, or make that folder a link to a larger disk"
        )


def in_words(size: float) -> str:
    """A number of bytes for people: ``18.4 GB``."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def clear_directory(folder: Path) -> None:
    """Remove everything in ``folder``; links are removed, not followed."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
