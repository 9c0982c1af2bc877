"""Staging of a fetch: its files and its progress, so that it can be interrupted at any moment.

An entry is staged beside its directory, in ``.fetching/<entry>/``: ``files`` will be published, ``done.json``
records completed steps. When complete, ``files`` replaces the entry's directory in one step.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mmpipe.artifacts.files import canonical_json, link_or_copy, read_object, sha256, write_json
from mmpipe.artifacts.manifest import NAME, fingerprint
from mmpipe.artifacts.state import open_state
from mmpipe.data.spec import InnerPath
from mmpipe.errors import DataError
from mmpipe.settings import Settings
from mmpipe.sources.transfer import archives
from mmpipe.sources.transfer.lock import LOCK
from mmpipe.sources.transfer.progress import bytes_in

log = logging.getLogger(__name__)
_BESIDE = ".fetching"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class WantedFile(Settings):
    """A file of an entry, with its expected size and digest."""

    to: InnerPath
    """Its path relative to the entry's directory."""
    sha256: Sha256 | None = None
    """Its digest; where none is published, the lock has that of the first fetch."""
    size: int | None = Field(None, gt=0)
    """Its size in bytes, if known."""


@dataclass(frozen=True)
class Expected:
    """The known facts about a file before it is fetched."""

    size: int | None = None
    """In bytes."""
    sha256: str | None = None
    says: str = "the catalogue"
    """Their source, for messages."""

    def check(self, path: Path, where: str) -> dict[str, Any]:
        """The file's ``size`` and ``sha256``. Raises DataError when they are not the expected ones."""
        size = path.stat().st_size
        if self.size not in (None, size):
            raise DataError(f"{where}: {size} bytes, but {self.says} says {self.size}")
        digest = sha256(path)
        if self.sha256 not in (None, digest):
            raise DataError(
                f"{where}: the content has the sha256 {digest}, but {self.says} says {self.sha256}; "
                "the publisher changed the file, or the copy is damaged"
            )
        return {"size": size, "sha256": digest}


@dataclass
class Staging:
    """A fetch in progress."""

    files: Path
    """Everything that will be published."""
    offered: Path
    """Folder for files supplied by hand: they are used, after the same checks, instead of being downloaded."""
    locked: Mapping[str, Any]
    """The lock's facts about the entry."""
    notes: Path
    downloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Size and sha256 of each verified file."""
    unpacked: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The contents of the archives, by the pattern of their names."""
    facts_brought: dict[str, Any] | None = None
    """The facts returned after fetching all files; None until then."""
    memory: dict[str, Any] = field(default_factory=dict)
    """A source's notes for a resumed call."""
    total: float = 0
    """Bytes of the whole fetch, as far as known."""

    @property
    def started(self) -> bool:
        """Whether any file is staged."""
        return bool(self.downloads) or self.facts_brought is not None

    def save(self) -> None:
        """Write the completed steps."""
        kept = ("downloads", "unpacked", "facts_brought", "memory")
        write_json(self.notes, {name: getattr(self, name) for name in kept})

    def once(self, bring: Callable[[], dict[str, Any]]) -> None:
        """Call ``bring()``, which fetches all files, unless an earlier call completed it."""
        if self.facts_brought is None:
            self.facts_brought = bring()
            self.save()

    def place(self, file: WantedFile, get: Callable[[Path, Expected], Any]) -> None:
        """Write a file by ``get(target, expected)``, unless it is staged or in ``offered``. ``get`` may return the
        file's size and sha256 when it has verified them."""
        if self.has(file):
            return
        target = self.files / file.to
        target.parent.mkdir(parents=True, exist_ok=True)
        proven = None
        if self.has_offer(file):
            log.info("taking %s", self.offered / file.to)
            link_or_copy(self.offered / file.to, target)
        else:
            proven = get(target, self._expected(file))
        self.prove(file, proven)

    def prove(self, file: WantedFile, proven: dict[str, Any] | None = None) -> None:
        """Verify a file and record it. A wrong one is deleted."""
        target = self.files / file.to
        try:
            self.downloads[file.to] = proven or self._expected(file).check(target, file.to)
        except DataError:
            target.unlink()
            raise
        self.save()

    def has(self, file: WantedFile) -> bool:
        """Whether the file is staged and verified."""
        return file.to in self.downloads

    def has_offer(self, file: WantedFile) -> bool:
        """Whether the file was put into ``offered``."""
        return (self.offered / file.to).is_file()

    def _expected(self, file: WantedFile) -> Expected:
        """The size and digest in the catalogue, else those in the lock."""
        pin = self.locked.get("downloads", {}).get(file.to)
        if pin and not file.sha256:
            return Expected(file.size or pin["size"], pin["sha256"], str(LOCK))
        return Expected(file.size, file.sha256)

    @property
    def consumed(self) -> list[str]:
        """Archives that were unpacked and deleted."""
        return [name for contents in self.unpacked.values() for name in contents["archives"]]

    def unpack(self, pattern: str, folder: str, flat: bool) -> None:
        """Unpack an archive, or the pieces of one, and delete it."""
        if pattern not in self.unpacked:
            pieces = sorted((path for path in self.files.glob(pattern) if path.is_file()), key=_natural)
            if not pieces:
                here = sorted(path.name for path in self.files.iterdir())
                raise DataError(
                    f"{self.files}: no file matches 'unpack: {pattern}'; there are {', '.join(here[:20]) or 'none'}"
                )
            log.info("unpacking %s", ", ".join(path.name for path in pieces))
            names = [path.relative_to(self.files).as_posix() for path in pieces]
            try:
                contents = archives.unpack(pieces, self.files / folder, flat)
            except archives.DamagedArchive as error:
                self._forget(names)
                hint = "run the same command again to fetch it anew"
                raise archives.DamagedArchive(f"{error}; {hint}") from error
            found = {"folder": folder, "files": contents.files, "size": contents.size, "archives": names}
            self.unpacked[pattern] = found
            self.save()
        for name in self.unpacked[pattern]["archives"]:
            (self.files / name).unlink(missing_ok=True)

    def _forget(self, names: list[str]) -> None:
        for name in names:
            self.downloads.pop(name, None)
            (self.files / name).unlink()
        self.facts_brought = None
        self.save()

    def facts(self) -> dict[str, Any]:
        """The facts for the manifest. Unpacked files are counted, not listed: there may be a million."""
        files = dict(sorted(self.downloads.items()))
        unpacked = {}
        for pattern, contents in self.unpacked.items():
            pieces = {name: files.pop(name) for name in contents["archives"] if name in files}
            unpacked[pattern] = contents | {"archives": pieces}
        return {**(self.facts_brought or {}), "unpacked": unpacked, "files": files}

    def publish(self, out: Path) -> None:
        """Replace ``out`` by the staged files in one step."""
        empty_directory(out)
        self.files.rename(out)


@contextmanager
def open_staging(out: Path, spec: Mapping[str, Any], locked: Mapping[str, Any]) -> Iterator[Staging]:
    """The staging of an entry, resumed from an interrupted fetch of the same ``spec``; deleted on success."""
    claim_output(out)
    work = out.parent / _BESIDE / out.name
    identity = fingerprint(canonical_json(spec), {"lock": canonical_json(locked)})
    with open_state(work, identity):
        files, notes = work / "files", work / "done.json"
        if notes.is_file() and not files.exists() and out.is_dir():
            out.rename(files)  # killed between publishing and cleaning up
        files.mkdir(exist_ok=True)
        if not any(files.iterdir()):
            notes.unlink(missing_ok=True)  # the files were removed by hand
        done = read_object(notes) if notes.is_file() else {}
        yield Staging(files, out.parent.parent / "manual" / out.name, locked, notes, **done)
        shutil.rmtree(work)


def staged_bytes(out: Path) -> int:
    """Bytes already fetched by an unfinished fetch of an entry."""
    work = out.parent / _BESIDE / out.name
    done = read_object(work / "done.json") if (work / "done.json").is_file() else {}
    if done.get("facts_brought") is None:
        return bytes_in(work / "files")
    return sum(file["size"] for file in done["downloads"].values())  # archives may be unpacked and deleted


def claim_output(out: Path) -> None:
    """Mark an entry's directory as one that fetches may fill and clear. Raises DataError when it holds files that no
    fetch wrote: they may be the user's."""
    mark = out.parent / _BESIDE / f"{out.name}.ours"
    if not mark.exists() and out.is_dir():
        foreign = next((entry.name for entry in out.iterdir() if entry.name != NAME), None)
        if foreign:
            raise DataError(
                f"{out}: holds files that no fetch put there ({foreign}, ...). If they are the data set, move them "
                f"elsewhere and adopt them by '{out.name}: {{source: path, path: /where/they/are}}'; "
                "if not, remove them"
            )
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def empty_directory(folder: Path) -> None:
    """Make ``folder``, or remove everything in it; links are removed, not followed."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts ``part_10`` after ``part_9``."""
    return [(int(digits or 0), text) for text, digits in re.findall(r"(\D*)(\d*)", path.as_posix())]
