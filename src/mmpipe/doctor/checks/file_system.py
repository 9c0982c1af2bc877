"""Whether the disk of results keeps the promises that publishing and locking rely on."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmpipe.artifacts.files import atomic_open, sync
from mmpipe.doctor.base import Finding, Machine

_TRY_LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def check(machine: Machine) -> Iterator[Finding]:
    for name in ("resources", "results"):
        folder = _existing(machine.root / name)
        try:
            with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as place:
                yield _try_out(Path(place), name)
        except OSError as error:
            yield Finding(
                "problem",
                f"{folder.absolute()} cannot be written ({error.strerror})",
                f"make it writable, or let '{name}' be a link",
            )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), Path("/"))


def _try_out(place: Path, name: str) -> Finding:
    """Lock a file against another process, and replace one by another."""
    link = f"mount it with locks (Lustre: -o flock), or let '{name}' be a link to another file system"
    with (place / "lock").open("w") as file:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding("problem", f"{name}/: no file locks ({error.strerror})", link)
        command = [sys.executable, "-S", "-c", _TRY_LOCK, str(place / "lock")]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
            return Finding("problem", f"{name}/: two processes get the same lock", link)
    for text in ("old", "new"):
        with atomic_open(place / "file") as file_:
            file_.write(text.encode())
    sync(place)
    if (place / "file").read_text() != "new" or set(os.listdir(place)) != {"lock", "file"}:
        return Finding("problem", f"{name}/: a renamed file does not replace the old one", link)
    return Finding("ok", f"{name}/: locks and renames work")
