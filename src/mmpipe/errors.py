"""Errors for the user.

Every error gives its cause, place (file, record, key) and remedy; the command line and the rule scripts print
the message without a traceback and exit with a non-zero status.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence

from mmpipe.escapes import redacted


class MmpipeError(Exception):
    """Base of all errors caused by input, configuration or environment rather than by a defect of the code. Their
    messages show no secrets."""

    def __str__(self) -> str:
        return redacted(super().__str__())


class ConfigError(MmpipeError):
    """An invalid configuration."""


class DataError(MmpipeError):
    """An invalid data set, record or image."""


class ArtifactError(MmpipeError):
    """A published artifact is missing, incomplete or of another kind than expected."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to ``name``, or the list of known names.

    Meant to be appended to a message about an unknown name.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""


def first_of(names: Iterable[object], limit: int = 8) -> str:
    """The first names in alphabetical order, and how many more there are."""
    return few(sorted(map(str, names)), limit)


def few(names: Sequence[str], shown: int = 3) -> str:
    """The first ``shown`` names and the number of the others: ``a, b, c and 4 more``."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def explained(error: BaseException) -> str:
    """The error in one line, with advice when the disk is full or cannot be written, or a data-loading process was killed."""
    text = f"{type(error).__name__}: {error}"
    if is_full_disk(error):
        text += "; the disk is full: free some space and run the same command again, nothing is lost"
    elif isinstance(error, OSError) and error.errno in _REMEDIES:
        text += f"; {_REMEDIES[error.errno]}, and run the same command again, nothing is lost"
    elif "DataLoader worker" in text and ("Killed" in text or "exited unexpectedly" in text):
        text += (
            "; a data-loading process was killed, most likely because the machine ran out of memory: raise "
            "hardware.memory_gb, or lower hardware.workers or micro_batch"
        )
    return text


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it followed from, is that of a full disk; libraries report that in several ways."""
    while error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(sign in str(error) for sign in _FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


_REMEDIES = {
    errno.EROFS: "the file system is read-only: mount it for writing, or let the folder be a link to another one",
    errno.EACCES: "give this user the permission to use the file and its folder (ls -l)",
    errno.EPERM: "give this user the permission to use the file and its folder (ls -l)",
    errno.ESTALE: "the file server has lost the file (a stale NFS handle): wait until the mount works",
    errno.EIO: "the disk or the file server failed: see to it (dmesg)",
}
"""What to do about an error of a file, besides a full disk."""
_FULL_DISK = (
    *("No space left on device", "Disk quota exceeded"),
    *("PytorchStreamWriter failed writing file", "iostream error", ". unexpected pos "),
)
"""How safetensors and torch report a full disk, torch.save in its last words; neither raises OSError."""
