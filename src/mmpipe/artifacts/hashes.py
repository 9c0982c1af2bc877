"""The sha256 of files, computed once per version of a file.

A version is the real path, size, inode and times of a file. Digests are remembered in this process, and those of files of
:data:`SMALL` bytes or more also in ``$XDG_CACHE_HOME/mmpipe/sha256`` (``~/.cache`` without it), one small file each. A
cache that is broken or cannot be written costs time and is no error.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mmpipe.artifacts.files import read_json, write_json

SMALL = 1 << 20
"""Bytes; the digests of smaller files are not worth a file in the cache."""
_PIECE = 8 << 20
_MARGIN = 100_000_000
"""Nanoseconds; a file that changed so shortly before may change again without another time stamp."""


class Version(NamedTuple):
    """What differs between two versions of a file; times in nanoseconds."""

    path: str
    size: int
    inode: int
    modified: int
    changed: int


_known: dict[str, tuple[Version, str]] = {}


def digest(path: Path, *, cache: bool = True) -> str:
    """Hex sha256 of a file's content. ``cache=False`` reads the file in any case, and remembers the digest. Raises
    OSError when the file cannot be read."""
    version = _version(path)
    if cache and (found := _remembered(version)):
        return found
    started = time.time_ns()
    value = _compute(Path(version.path))
    if _version(path) == version and version.changed < started - _MARGIN:
        _remember(version, value)
    return value


def digests(paths: Iterable[Path], *, cache: bool = True) -> dict[Path, str | None]:
    """The digest of each file, None where it cannot be read, computed in as many threads as there are cores."""

    def of(path: Path) -> str | None:
        try:
            return digest(path, cache=cache)
        except OSError:
            return None

    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(unique, pool.map(of, unique), strict=True))


def known() -> list[list[Any]]:
    """The digests that this process knows, as JSON, for :func:`learn` of another one."""
    return [[*version, value] for version, value in list(_known.values())]


def learn(entries: Iterable[Sequence[Any]]) -> None:
    """Remember what another process found; files that changed since are hashed again."""
    _known.update({version[0]: (Version(*version), value) for *version, value in entries})


def _compute(path: Path) -> str:
    """The sha256 of a file. In large pieces, without Python's lock: weights are loaded meanwhile."""
    found, buffer = hashlib.sha256(), bytearray(min(_PIECE, path.stat().st_size + 1))
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            found.update(view[:size])
    return found.hexdigest()


def _version(path: Path) -> Version:
    real = os.path.realpath(path)
    facts = os.stat(real)
    return Version(real, facts.st_size, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns)


def _remembered(version: Version) -> str | None:
    """The digest of a version of a file; None when it is not known."""
    known, value = _known.get(version.path, (None, ""))
    if known == version:
        return value
    if version.size < SMALL:
        return None
    try:
        entry = read_json(_entry(version))
        value = entry["sha256"]
        if entry["version"] != list(version) or not re.fullmatch("[0-9a-f]{64}", value):
            return None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError):
        return None
    _known[version.path] = version, value
    return value


def _remember(version: Version, value: str) -> None:
    _known[version.path] = version, value
    if version.size < SMALL:
        return
    try:
        write_json(_entry(version), {"version": list(version), "sha256": value})
    except (OSError, ValueError, RuntimeError):
        return


def _entry(version: Version) -> Path:
    """The file of the cache about a file. Raises RuntimeError when the user has no home directory."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = folder if folder.is_absolute() else Path.home() / ".cache"
    name = hashlib.sha256(os.fsencode(version.path)).hexdigest()[:32]
    return home / "mmpipe" / "sha256" / f"{name}.json"
