"""Finding and inspecting the images that records name, many at a time and each once."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mmpipe.artifacts.files import find_name, leaves_folder, store_by_content
from mmpipe.data.formats.base import ParsedRecord
from mmpipe.data.images import Inspection, inspect_image
from mmpipe.data.records import BadRecord
from mmpipe.errors import DataError

_EMBEDDED = "\x00"
"""Prefix of the names of extracted images; forbidden in annotations."""

_LONGEST_NAME = 200
REMEMBERED = 16_384
"""Size of the cache of inspected images."""


class ImageInfo(NamedTuple):
    """An image named by a record, as found and inspected."""

    name: str
    """Its path as records carry it: relative to the working directory if below it; empty if not found."""
    inspection: Inspection


class EmbeddedImages:
    """Images embedded in annotations, extracted to files named after their content, equal ones once. They are
    written into ``folder``, which will be published as ``published``."""

    def __init__(self, folder: Path, published: Path) -> None:
        self.folder = folder
        self.published = published

    def keep(self, content: bytes) -> str:
        """Write one image; returns its name relative to the folder."""
        return store_by_content(content, self.folder, _suffix(content), nested=True)


class ImageFinder:
    """The images of one source: in folders that names are relative to, searched in order, or embedded."""

    def __init__(self, folders: Sequence[Path], embedded: EmbeddedImages) -> None:
        self._folders = folders
        self._embedded = embedded
        self._found: dict[str, ImageInfo] = {}
        for folder in folders:
            _check_readable(folder)

    def unpacked(self, parsed: ParsedRecord) -> ParsedRecord:
        """The record with its embedded images written out and named. Raises DataError for a name that leads out of the
        folders."""
        if parsed.record is None:
            return parsed
        names = parsed.record.images
        contents = parsed.embedded or (None,) * len(names)
        for name, content in zip(names, contents, strict=True):
            if content is None:
                _check_name(name)
        if not parsed.embedded:
            return parsed
        stored = tuple(
            name if content is None else _EMBEDDED + self._embedded.keep(content)
            for name, content in zip(names, contents, strict=True)
        )
        return replace(parsed, record=replace(parsed.record, images=stored), embedded=())

    def prepare(self, names: Iterable[str], pool: Executor) -> None:
        """Find and decode these images, except those of the latest calls."""
        wanted = dict.fromkeys(names)
        new = [name for name in wanted if name not in self._found]
        # the latest ones are last
        kept = {name: self._found.pop(name) for name in wanted if name in self._found}
        self._found |= kept
        self._found.update(zip(new, pool.map(self._find, new), strict=True))
        for name in list(islice(self._found, max(0, len(self._found) - max(REMEMBERED, len(wanted))))):
            del self._found[name]

    def __getitem__(self, name: str) -> ImageInfo:
        """A prepared image. Raises BadRecord if it is missing or cannot be trained on."""
        found = self._found[name]
        if not found.name:
            folders = " or ".join(str(folder) for folder in self._folders)
            raise BadRecord("missing image", f"there is no {_short(name)} in {folders}")
        if found.inspection.fault:
            raise BadRecord("corrupt image", found.inspection.fault)
        return found

    def _find(self, name: str) -> ImageInfo:
        if name.startswith(_EMBEDDED):
            inner = name.removeprefix(_EMBEDDED)
            inspection = inspect_image(self._embedded.folder / inner)
            return ImageInfo(_from_here(self._embedded.published / inner), inspection)
        for folder in self._folders:
            path = folder / name
            try:
                path = find_name(folder, name)
                there = path.is_file()
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:  # no valid file name
                    continue
                raise DataError(f"{path}: cannot be looked at ({error.strerror})") from error
            if there:
                return ImageInfo(_from_here(path), inspect_image(path))
        return ImageInfo("", Inspection())


def _suffix(content: bytes) -> str:
    try:
        return f".{Image.open(io.BytesIO(content)).format}".lower()
    except Exception:  # noqa: BLE001 - Pillow's decoders raise errors of any type; the inspection finds the reason
        return ".unknown"


def _short(name: str) -> str:
    """A name shortened for messages: malformed ones can be long."""
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


def _check_name(name: str) -> None:
    """Raise DataError for an image name that leads out of the folder."""
    if leaves_folder(name):
        raise DataError(
            f"the image name {name!r} leads out of the data set's folder; nothing is read from there: "
            "make the names in the annotations relative"
        )
