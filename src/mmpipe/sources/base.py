"""What all sources share, and what those share that download."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from mmpipe.config.base import Settings
from mmpipe.data.spec import InnerPath
from mmpipe.errors import DataError

if TYPE_CHECKING:
    from mmpipe.fetching.http import Expected

log = logging.getLogger(__name__)
_NOTES = frozenset({"description", "licence", "homepage", "size_gb", "records"})
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Source(Settings):
    """An entry of ``backbones.yaml`` or ``datasets.yaml``."""

    NOTES: ClassVar[frozenset[str]] = _NOTES
    """Fields that describe the entry and do not change what is fetched."""

    description: str = ""
    """What it is, in one line."""
    licence: str = ""
    """The licence it is given under, as its publisher names it."""
    homepage: str = ""
    """Where a person reads about it."""
    size_gb: float | None = Field(None, gt=0)
    """About how many GB are fetched, where that is known; the disk must have that room."""
    records: int | None = Field(None, gt=0)
    """How many records (or pictures) its publishers name."""

    def fetch(self, out: Path, locked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Bring the entry's files into ``out`` and return facts for the manifest.

        Called again after an interruption; a source that can go on where it stopped does so. ``locked`` is what the lock
        says about the entry: what is fetched must agree with it.
        """
        raise NotImplementedError

    def needs(self) -> tuple[str, ...]:
        """Other data sets that must be there first."""
        return ()

    def spec(self) -> dict[str, Any]:
        """What determines the content; descriptions do not."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude=set(self.NOTES)) | {
            "source": self.kind
        }

    @property
    def kind(self) -> str:
        """The value of the ``source`` key."""
        return str(type(self).model_fields["source"].default)


class WantedFile(Settings):
    """A file of an entry, and how to know the right one."""

    to: InnerPath
    """Where it goes, relative to the entry's directory."""
    sha256: Sha256 | None = None
    """The digest it must have; where nobody publishes one, the lock keeps that of the first fetch."""
    size: int | None = Field(None, gt=0)
    """Its size in bytes, if known."""


class Downloaded(Source):
    """A source whose files come to this machine and are ours from then on.

    Everything happens in a directory beside the entry's and moves there when it is whole. An interrupted fetch goes on where
    it stopped: what was downloaded is not downloaded again, what was unpacked is not unpacked again.
    """

    unpack: dict[InnerPath, InnerPath] = {}
    """Archives to unpack and the folder for each, in this order (``images.zip: images``). A name may be a pattern
    (``images.zip.part*``) for one archive in several pieces. The archives are removed once they are unpacked."""
    flat: bool = False
    """Drop the folders inside the archives, as ``unzip -j`` does."""

    @abstractmethod
    def bring(self, desk: Desk) -> dict[str, Any]:
        """Bring the files to ``desk.files`` and return facts for the manifest."""

    def fetch(self, out: Path, locked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        from mmpipe.artifacts.files import canonical_json
        from mmpipe.fetching.space import check_space

        take_possession(out)
        with _desk(out, canonical_json([self.spec(), dict(locked or {})]), dict(locked or {})) as desk:
            if not desk.done["brought"]:
                if self.size_gb and not desk.done["downloads"]:
                    # an archive and its contents are there at the same time
                    check_space(desk.files, self.size_gb * 1e9 * (2 if self.unpack else 1), str(out))
                desk.done["facts"] = self.bring(desk)
                desk.done["brought"] = True
                desk.save()
            for pattern, folder in self.unpack.items():
                desk.unpack(pattern, folder, self.flat)
            facts = desk.facts()
            desk.publish(out)
        return facts


@dataclass
class Desk:
    """Where a fetch in progress keeps its files and its notes."""

    files: Path
    """Everything that will be published."""
    offered: Path
    """Where a person may have put files: they are taken, after the same checks, instead of being downloaded."""
    locked: Mapping[str, Any]
    """What the lock says about the entry."""
    notes: Path
    done: dict[str, Any]
    """What need not be done again."""

    def save(self) -> None:
        """Remember ``done``."""
        from mmpipe.artifacts.files import write_json

        write_json(self.notes, self.done)

    def expected(self, file: WantedFile) -> Expected:
        """What the catalogue and, where that is silent, the lock say about a file."""
        from mmpipe.fetching.http import Expected
        from mmpipe.fetching.lock import LOCK

        pin = self.locked.get("downloads", {}).get(file.to)
        if pin and not file.sha256:
            return Expected(file.size or pin["size"], pin["sha256"], str(LOCK))
        return Expected(file.size, file.sha256)

    def place(self, file: WantedFile, get: Callable[[Path, Expected], Any]) -> None:
        """Have ``get(target, expected)`` write a file, unless it is here or a person has put it into ``offered``."""
        if self.has(file):
            return
        target, expected = self.files / file.to, self.expected(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.has_offer(file):
            log.info("taking %s", self.offered / file.to)
            link_or_copy(self.offered / file.to, target)
        else:
            get(target, expected)
        self.prove(file)

    def prove(self, file: WantedFile) -> None:
        """Compare a file that has come with what is known about it, and remember it. A wrong one goes."""
        target = self.files / file.to
        try:
            self.done["downloads"][file.to] = self.expected(file).check(target, file.to)
        except DataError:
            target.unlink()
            raise
        self.save()

    def has(self, file: WantedFile) -> bool:
        """Whether the file is here already, proven."""
        return file.to in self.done["downloads"]

    def has_offer(self, file: WantedFile) -> bool:
        """Whether a person has put the file where it is taken from."""
        return (self.offered / file.to).is_file()

    def unpack(self, pattern: str, folder: str, flat: bool) -> None:
        """Unpack an archive, or the pieces of one, and drop it."""
        from mmpipe.fetching import archives

        pieces = sorted(path for path in self.files.glob(pattern) if path.is_file())
        if pattern not in self.done["unpacked"]:
            names = [path.relative_to(self.files).as_posix() for path in pieces]
            if not pieces:
                raise DataError(
                    f"{self.files}: no file matches 'unpack: {pattern}'; there are "
                    f"{', '.join(sorted(path.name for path in self.files.iterdir())[:20]) or 'none'}"
                )
            log.info("unpacking %s", ", ".join(path.name for path in pieces))
            try:
                contents = archives.unpack(pieces, self.files / folder, flat)
            except archives.DamagedArchive as error:
                self._forget(pieces)
                raise archives.DamagedArchive(
                    f"{error}; run the same command again to fetch it anew"
                ) from error
            self.done["unpacked"][pattern] = {
                "folder": folder,
                "files": contents.files,
                "size": contents.size,
                "archives": names,
            }
            self.save()
        for name in self.done["unpacked"][pattern]["archives"]:
            (self.files / name).unlink(missing_ok=True)

    def _forget(self, pieces: list[Path]) -> None:
        for piece in pieces:
            self.done["downloads"].pop(piece.relative_to(self.files).as_posix(), None)
            piece.unlink()
        self.done["brought"] = False
        self.save()

    def facts(self) -> dict[str, Any]:
        """The facts for the manifest. Files out of archives are counted, not listed: there may be a million."""
        files = dict(sorted(self.done["downloads"].items()))
        unpacked = {
            pattern: contents
            | {"archives": {name: files.pop(name) for name in contents["archives"] if name in files}}
            for pattern, contents in self.done["unpacked"].items()
        }
        return {**self.done["facts"], "unpacked": unpacked, "files": files}

    def publish(self, out: Path) -> None:
        """Put everything in the place of ``out`` at once; what an earlier version left there goes."""
        from mmpipe.fetching.space import clear_directory

        out.mkdir(parents=True, exist_ok=True)
        clear_directory(out)
        self.files.rename(out)


@contextmanager
def _desk(out: Path, identity: str, locked: Mapping[str, Any]) -> Iterator[Desk]:
    """The desk of an entry, as an interrupted fetch of the same ``identity`` left it; gone when the block ends well."""
    import shutil

    from mmpipe.artifacts.files import read_json
    from mmpipe.artifacts.manifest import fingerprint
    from mmpipe.artifacts.state import open_state

    work = out.parent / ".fetching" / out.name
    with open_state(work, fingerprint(identity, {})):
        files, notes = work / "files", work / "done.json"
        if notes.is_file() and not files.exists() and out.is_dir():
            out.rename(files)  # killed between publishing and forgetting
        files.mkdir(exist_ok=True)
        if not any(files.iterdir()):
            notes.unlink(missing_ok=True)  # a person removed the files
        done = (
            read_json(notes)
            if notes.is_file()
            else {"brought": False, "downloads": {}, "unpacked": {}, "facts": {}}
        )
        yield Desk(files, out.parent.parent / "manual" / out.name, locked, notes, done)
        shutil.rmtree(work)


def take_possession(out: Path) -> None:
    """Make an entry's directory ours to fill and to clear.

    Raises DataError when it holds files that no fetch put there: they may be a person's, and are not ours to remove.
    """
    mark = out.parent / ".fetching" / f"{out.name}.ours"
    foreign = (
        []
        if mark.exists() or not out.is_dir()
        else [entry for entry in out.iterdir() if entry.name != "manifest.json"]
    )
    if foreign:
        raise DataError(
            f"{out}: holds files that no fetch put there ({foreign[0].name}, ...). If they are the data set, move them "
            f"elsewhere and adopt them by '{out.name}: {{source: path, path: /where/they/are}}'; if not, remove them"
        )
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def link_or_copy(origin: Path, target: Path) -> None:
    """Make ``target`` the same file: a hard link takes no room; across file systems it has to be a copy."""
    import os
    import shutil

    target.unlink(missing_ok=True)
    try:
        os.link(origin.resolve(), target)
    except OSError:
        shutil.copyfile(origin, target)


def check_online(what: str) -> None:
    """Raise DataError when the environment says that this machine stays offline (``HF_HUB_OFFLINE``)."""
    import os

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise DataError(
            f"{what} is not on this machine, and HF_HUB_OFFLINE forbids the network; "
            "run this rule where there is a network, or name a copy on disk with 'source: path'"
        )
