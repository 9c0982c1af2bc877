"""Entries downloaded from plain URLs."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field

from mmpipe.config.base import Settings
from mmpipe.errors import DataError
from mmpipe.sources.base import Source

_MAX_RATIO = 200  # a zip member that grows more than this is taken for a bomb


class RemoteFile(Settings):
    """One file behind a URL."""

    url: str
    """``https://...``."""
    to: str
    """Where it goes, relative to the entry's directory."""
    sha256: str | None = None
    """Hex digest the file must have; unknown is allowed and recorded in the manifest."""
    extract: bool = False
    """Unpack the archive into the folder ``to`` and drop it."""


class Url(Source):
    """Download files over HTTP(S), check their hashes, unpack archives safely."""

    source: Literal["url"] = "url"
    files: list[RemoteFile] = Field(min_length=1)

    def fetch(self, out: Path) -> dict[str, Any]:
        downloads = out / ".downloads"
        for file in self.files:
            target = _inside(out, file.to)
            done = downloads / f"{file.to.replace('/', '_')}.done"
            if done.is_file() and done.read_text() == file.url:
                continue
            archive = _download(file, downloads)
            if file.extract:
                unpack(archive, target)
                archive.unlink()
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                archive.replace(target)
            done.write_text(file.url)
        shutil.rmtree(downloads)
        return {"urls": [file.url for file in self.files]}


def _inside(root: Path, name: str) -> Path:
    """``root / name``; DataError when the name would lead out of ``root``."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise DataError(f"{root}: '{name}' would be written outside this directory; the archive is not safe")
    return root.joinpath(*pure.parts)


def _download(file: RemoteFile, folder: Path) -> Path:
    import pooch
    import requests

    known = f"sha256:{file.sha256}" if file.sha256 else None
    downloader = pooch.HTTPDownloader(progressbar=False, timeout=60)
    name = file.to.strip("/").replace("/", "_") + ".part"
    try:
        return Path(
            pooch.retrieve(file.url, known_hash=known, fname=name, path=folder, downloader=downloader)
        )
    except ValueError as error:
        raise DataError(
            f"{file.url}: the downloaded file has another sha256 than the catalogue says ({error})"
        ) from error
    except requests.RequestException as error:
        raise DataError(f"{file.url}: the download failed ({error}); run the same command again") from error


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip or tar archive into ``target``.

    Refuses absolute names, ``..``, links, devices and members that grow out of proportion, with a DataError.
    """
    target.mkdir(parents=True, exist_ok=True)
    if zipfile.is_zipfile(archive):
        _unpack_zip(archive, target)
    elif tarfile.is_tarfile(archive):
        _unpack_tar(archive, target)
    else:
        raise DataError(f"{archive}: neither a zip nor a tar archive; set 'extract: false' or check the URL")


def _unpack_zip(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as bundle:
        for member in bundle.infolist():
            path = _inside(target, member.filename)
            if (member.external_attr >> 28) == 0xA:
                raise DataError(
                    f"{archive}: the member '{member.filename}' is a link; the archive is not safe"
                )
            if member.file_size > _MAX_RATIO * max(member.compress_size, 1024):
                raise DataError(
                    f"{archive}: '{member.filename}' would grow from {member.compress_size} to {member.file_size} bytes"
                )
            if member.is_dir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with bundle.open(member) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def _unpack_tar(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as bundle:
        try:
            bundle.extractall(target, filter="data")
        except tarfile.FilterError as error:
            raise DataError(f"{archive}: {error}; the archive is not safe") from error
