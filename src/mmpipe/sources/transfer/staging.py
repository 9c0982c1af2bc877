"""Where a fetch in progress keeps its files and its notes, so that it can be interrupted at any moment.

The desk of an entry stands beside its directory, in ``.fetching/<entry>/``: ``files`` is what will be published, ``done.json``
what need not be done again. When all is there, ``files`` takes the place of the entry's directory in one step.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpipe.artifacts.files import canonical_json, link_or_copy, read_json, write_json
from mmpipe.artifacts.manifest import NAME, fingerprint
from mmpipe.artifacts.state import open_state
from mmpipe.errors import DataError
from mmpipe.sources.transfer import archives
from mmpipe.sources.transfer.download import Expected
from mmpipe.sources.transfer.lock import LOCK
from mmpipe.sources.transfer.progress import bytes_in
from mmpipe.sources.transfer.space import clear_directory

if TYPE_CHECKING:
    from mmpipe.sources.base import WantedFile

log = logging.getLogger(__name__)
_BESIDE = ".fetching"


@dataclass
class Desk:
    """A fetch in progress."""

    files: Path
    """Everything that will be published."""
    offered: Path
    """Where a person may have put files: they are taken, after the same checks, instead of being downloaded."""
    locked: Mapping[str, Any]
    """What the lock says about the entry."""
    notes: Path
    downloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Size and sha256 of each file that has come, proven."""
    unpacked: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What came out of the archives, by the pattern of their names."""
    facts_brought: dict[str, Any] | None = None
    """What bringing all files returned; None until then."""

    memory: dict[str, Any] = field(default_factory=dict)
    """What a source wants to know when it is called again."""
    total: float = 0
    """Bytes that will have come in the end, as far as anybody knows."""

    @property
    def started(self) -> bool:
        """Whether anything is here already."""
        return bool(self.downloads) or self.facts_brought is not None

    def save(self) -> None:
        """Remember what is done."""
        kept = ("downloads", "unpacked", "facts_brought", "memory")
        write_json(self.notes, {name: getattr(self, name) for name in kept})

    def once(self, bring: Callable[[], dict[str, Any]]) -> None:
        """Have ``bring()`` bring all files, unless it did."""
        if self.facts_brought is None:
            self.facts_brought = bring()
            self.save()

    # --- files ----------------------------------------------------------------------------------------------------

    def place(self, file: WantedFile, get: Callable[[Path, Expected], Any]) -> None:
        """Have ``get(target, expected)`` write a file, unless it is here or a person has put it into ``offered``.

        ``get`` may return the file's size and sha256 when it has proven it.
        """
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
        """Compare a file that has come with what is known about it, and remember it. A wrong one goes."""
        target = self.files / file.to
        try:
            self.downloads[file.to] = proven or self._expected(file).check(target, file.to)
        except DataError:
            target.unlink()
            raise
        self.save()

    def has(self, file: WantedFile) -> bool:
        """Whether the file is here already, proven."""
        return file.to in self.downloads

    def has_offer(self, file: WantedFile) -> bool:
        """Whether a person has put the file where it is taken from."""
        return (self.offered / file.to).is_file()

    def _expected(self, file: WantedFile) -> Expected:
        """What the catalogue and, where that is silent, the lock say about a file."""
        pin = self.locked.get("downloads", {}).get(file.to)
        if pin and not file.sha256:
            return Expected(file.size or pin["size"], pin["sha256"], str(LOCK))
        return Expected(file.size, file.sha256)

    # --- archives -------------------------------------------------------------------------------------------------

    @property
    def consumed(self) -> list[str]:
        """Archives that are unpacked and gone."""
        return [name for contents in self.unpacked.values() for name in contents["archives"]]

    def unpack(self, pattern: str, folder: str, flat: bool) -> None:
        """Unpack an archive, or the pieces of one, and drop it."""
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
            self.unpacked[pattern] = {
                "folder": folder,
                "files": contents.files,
                "size": contents.size,
                "archives": names,
            }
            self.save()
        for name in self.unpacked[pattern]["archives"]:
            (self.files / name).unlink(missing_ok=True)

    def _forget(self, names: list[str]) -> None:
        for name in names:
            self.downloads.pop(name, None)
            (self.files / name).unlink()
        self.facts_brought = None
        self.save()

    # --- the end --------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """The facts for the manifest. Files out of archives are counted, not listed: there may be a million."""
        files = dict(sorted(self.downloads.items()))
        unpacked = {}
        for pattern, contents in self.unpacked.items():
            pieces = {name: files.pop(name) for name in contents["archives"] if name in files}
            unpacked[pattern] = contents | {"archives": pieces}
        return {**(self.facts_brought or {}), "unpacked": unpacked, "files": files}

    def publish(self, out: Path) -> None:
        """Put everything in the place of ``out`` at once; what an earlier version left there goes."""
        out.mkdir(parents=True, exist_ok=True)
        clear_directory(out)
        self.files.rename(out)


@contextmanager
def desk_for(out: Path, spec: Mapping[str, Any], locked: Mapping[str, Any]) -> Iterator[Desk]:
    """The desk of an entry, as an interrupted fetch of the same ``spec`` left it; gone when the block ends well."""
    take_possession(out)
    work = out.parent / _BESIDE / out.name
    identity = fingerprint(canonical_json(spec), {"lock": canonical_json(locked)})
    with open_state(work, identity):
        files, notes = work / "files", work / "done.json"
        if notes.is_file() and not files.exists() and out.is_dir():
            out.rename(files)  # killed between publishing and forgetting
        files.mkdir(exist_ok=True)
        if not any(files.iterdir()):
            notes.unlink(missing_ok=True)  # a person removed the files
        done = read_json(notes) if notes.is_file() else {}
        yield Desk(files, out.parent.parent / "manual" / out.name, locked, notes, **done)
        shutil.rmtree(work)


def partial(out: Path) -> int:
    """Bytes that an unfinished fetch of an entry has brought so far."""
    work = out.parent / _BESIDE / out.name
    done = read_json(work / "done.json") if (work / "done.json").is_file() else {}
    if done.get("facts_brought") is None:
        return bytes_in(work / "files")
    return sum(file["size"] for file in done["downloads"].values())  # archives may be unpacked and gone


def take_possession(out: Path) -> None:
    """Make an entry's directory ours to fill and to clear.

    Raises DataError when it holds files that no fetch put there: they may be a person's, and are not ours to remove.
    """
    mark = out.parent / _BESIDE / f"{out.name}.ours"
    if not mark.exists() and out.is_dir():
        foreign = next((entry.name for entry in out.iterdir() if entry.name != NAME), None)
        if foreign:
            raise DataError(
                f"{out}: holds files that no fetch put there ({foreign}, ...). If they are the data set, move them elsewhere "
                f"and adopt them by '{out.name}: {{source: path, path: /where/they/are}}'; if not, remove them"
            )
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts ``part_10`` behind ``part_9``."""
    return [(int(digits or 0), text) for text, digits in re.findall(r"(\D*)(\d*)", path.as_posix())]
