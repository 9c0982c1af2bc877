"""Finding and inspecting the images that records name, many at a time and each once."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from mmpipe.data.formats.base import Draft
from mmpipe.data.images import Inspection, inspect_image
from mmpipe.data.records import BadRecord
from mmpipe.errors import DataError

_EMBEDDED = "\x00"
"""Begins the names of images that were written out; no name in annotations may hold it."""

_LONGEST_NAME = 200
REMEMBERED = 16_384
"""So many images are remembered after they were decoded; who comes back later is decoded again."""


class Found(NamedTuple):
    """An image that a record names."""

    name: str
    """Its path as records carry it: relative to the working directory if below it; empty if not found."""
    inspection: Inspection


class EmbeddedImages:
    """Images that annotations contain, written out as files named after their content, equal ones once.

    They are written into ``folder``, which will later be found at ``published``.
    """

    def __init__(self, folder: Path, published: Path) -> None:
        self.folder = folder
        self.published = published

    def keep(self, content: bytes) -> str:
        """Write one image; returns its name relative to the folder."""
        digest = hashlib.sha256(content).hexdigest()[:32]
        name = f"{digest[:2]}/{digest}{_suffix(content)}"
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return name


class ImageFinder:
    """The images of one part: in folders that names are relative to, searched in order, or embedded."""

    def __init__(self, folders: Sequence[Path], embedded: EmbeddedImages) -> None:
        self._folders = folders
        self._embedded = embedded
        self._found: dict[str, Found] = {}
        for folder in folders:
            _check_readable(folder)

    def unpacked(self, draft: Draft) -> Draft:
        """The draft with its embedded images written out, and their names in its record.

        Raises DataError for a name that leads out of the folders.
        """
        if draft.record is None:
            return draft
        if not draft.embedded:
            for name in draft.record.images:
                _check_inside(name)
            return draft
        names = tuple(_EMBEDDED + self._embedded.keep(content) for content in draft.embedded)
        return replace(draft, record=replace(draft.record, images=names), embedded=())

    def prepare(self, names: Iterable[str], pool: Executor) -> None:
        """Find and decode these images, but for those that were asked for not long ago."""
        wanted = dict.fromkeys(names)
        new = [name for name in wanted if name not in self._found]
        # the latest ones stand last
        kept = {name: self._found.pop(name) for name in wanted if name in self._found}
        self._found |= kept
        self._found.update(zip(new, pool.map(self._find, new), strict=True))
        for name in list(islice(self._found, max(0, len(self._found) - max(REMEMBERED, len(wanted))))):
            del self._found[name]

    def __getitem__(self, name: str) -> Found:
        """A prepared image. Raises BadRecord if it is missing or cannot be trained on."""
        found = self._found[name]
        if not found.name:
            folders = " or ".join(str(folder) for folder in self._folders)
            raise BadRecord("missing image", f"there is no {_short(name)} in {folders}")
        if found.inspection.fault:
            raise BadRecord("corrupt image", found.inspection.fault)
        return found

    def _find(self, name: str) -> Found:
        if name.startswith(_EMBEDDED):
            inner = name.removeprefix(_EMBEDDED)
            inspection = inspect_image(self._embedded.folder / inner)
            return Found(_from_here(self._embedded.published / inner), inspection)
        for folder in self._folders:
            path = folder / name
            try:
                there = path.is_file()
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:  # no file can be called so
                    continue
                raise DataError(f"{path}: cannot be looked at ({error.strerror})") from error
            if there:
                return Found(_from_here(path), inspect_image(path))
        return Found("", Inspection())


def _suffix(content: bytes) -> str:
    try:
        return f".{Image.open(io.BytesIO(content)).format}".lower()
    except UnidentifiedImageError:
        return ".unknown"


def _short(name: str) -> str:
    """A name for messages: a text that took the place of a name can be long."""
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."


def _from_here(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else path.as_posix()


def _check_readable(folder: Path) -> None:
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        raise DataError(
            f"{folder}: the folder of images cannot be read ({error.strerror}); "
            "correct `images` of the part, or fetch the data set again"
        ) from error


def _check_inside(name: str) -> None:
    """Raise DataError for a name that leads out of the folder: an honest data set has none."""
    if name.startswith(("/", "\\")) or ".." in PurePosixPath(name).parts or "\x00" in name:
        raise DataError(
            f"the image name {name!r} leads out of the data set's folder; nothing is read from there: "
            "make the names in the annotations relative"
        )
