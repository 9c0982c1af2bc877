"""Entries on Google Drive."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmpipe.errors import DataError
from mmpipe.sources.base import Downloaded, check_online
from mmpipe.sources.transfer.staging import Expected, Staging, WantedFile

_OPTIONS: dict[str, Any] = {"resume": True, "use_cookies": False, "timeout": 60, "retries": 5}
DriveId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{10,}$")]


class DriveFile(WantedFile):
    """One file on Google Drive."""

    id: DriveId
    """The part of its address after ``/file/d/``."""


class Drive(Downloaded):
    """Download files, or a whole folder, that are shared on Google Drive; needs the extra ``drive``. Drive refuses a
    large file for a while after many downloads. Files downloaded with a browser and put into
    ``resources/manual/<entry>/`` are taken from there."""

    source: Literal["drive"] = "drive"
    files: tuple[DriveFile, ...] = ()
    folder: DriveId | None = None
    """The part of a folder's address after ``/folders/``."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Drive:
        if bool(self.files) == bool(self.folder):
            raise ValueError("give either 'files' or 'folder'")
        return self

    def wanted(self) -> tuple[WantedFile, ...]:
        return self.files

    def fill(self, staging: Staging) -> dict[str, Any]:
        for file in self.files:
            staging.place(file, partial(_download, file.id, staging))
        if self.folder:
            _download_folder(self.folder, staging)
        return {}


def _download(file_id: str, staging: Staging, target: Path, expected: Expected) -> None:
    address = f"https://drive.google.com/file/d/{file_id}/view"
    with _gdown(address, staging) as gdown:
        gdown.download(id=file_id, output=str(target), quiet=not sys.stderr.isatty(), **_OPTIONS)
    for abandoned in target.parent.glob(f"{target.name}*.part"):
        abandoned.unlink()


def _download_folder(folder_id: str, staging: Staging) -> None:
    address = f"https://drive.google.com/drive/folders/{folder_id}"
    with _gdown(address, staging) as gdown:
        gdown.download_folder(id=folder_id, output=str(staging.files), quiet=not sys.stderr.isatty(), **_OPTIONS)
    found = sorted(path for path in staging.files.rglob("*") if path.is_file() and path.suffix != ".part")
    if not found:
        raise DataError(f"{address}: the folder is empty")
    for path in found:
        staging.prove(WantedFile(to=path.relative_to(staging.files).as_posix()))


@contextmanager
def _gdown(address: str, staging: Staging) -> Iterator[ModuleType]:
    """The library, with readable errors."""
    check_online(address)
    instead = f"or fetch it with a browser from {address} and put it into {staging.offered}/"
    try:
        gdown = importlib.import_module("gdown")
    except ModuleNotFoundError as error:
        raise DataError(f"Google Drive needs an extra: pip install 'mmpipe[drive]'; {instead}") from error
    try:
        yield gdown
    except (gdown.exceptions.DownloadError, OSError) as error:
        raise DataError(f"{address}: Google Drive did not give it ({error}); try later, {instead}") from error
