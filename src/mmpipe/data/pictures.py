"""Finding and inspecting the pictures that records name, many at a time and each once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mmpipe.data.images import Inspection, inspect_picture
from mmpipe.data.records import BadRecord
from mmpipe.errors import DataError


class Found(NamedTuple):
    """A picture that a record names: where it is, and what is to be said about it."""

    path: Path | None
    """None if none of the folders has it."""
    inspection: Inspection


class PictureFolders:
    """Folders that picture names are relative to, searched in order."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._found: dict[str, Found] = {}
        for folder in folders:
            _check_readable(folder)

    def prepare(self, names: Iterable[str], pool: Executor) -> None:
        """Find and decode the pictures that have not been asked for yet."""
        new = [name for name in dict.fromkeys(names) if name not in self._found]
        for name in new:
            _check_inside(name)
        self._found.update(zip(new, pool.map(self._find, new), strict=True))

    def __getitem__(self, name: str) -> Found:
        """A prepared picture. Raises BadRecord if it is missing or cannot be trained on."""
        found = self._found[name]
        if found.path is None:
            folders = " or ".join(str(folder) for folder in self._folders)
            raise BadRecord("missing picture", f"there is no {name} in {folders}")
        if found.inspection.fault:
            raise BadRecord("corrupt picture", found.inspection.fault)
        return found

    def _find(self, name: str) -> Found:
        for folder in self._folders:
            path = folder / name
            try:
                there = path.is_file()
            except OSError as error:
                raise DataError(f"{path}: cannot be looked at ({error.strerror})") from error
            if there:
                return Found(path, inspect_picture(path))
        return Found(None, Inspection())


def _check_readable(folder: Path) -> None:
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        raise DataError(
            f"{folder}: the folder of pictures cannot be read ({error.strerror}); "
            "correct `images` of the part, or fetch the data set again"
        ) from error


def _check_inside(name: str) -> None:
    """Raise DataError for a name that leads out of the folder: an honest data set has none."""
    if name.startswith(("/", "\\")) or ".." in PurePosixPath(name).parts or "\x00" in name:
        raise DataError(
            f"the picture name {name!r} leads out of the data set's folder; nothing is read from there: "
            "make the names in the annotations relative"
        )
