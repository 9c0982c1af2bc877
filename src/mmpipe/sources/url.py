"""Entries downloaded from plain URLs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mmpipe.sources.base import Downloaded, check_online
from mmpipe.sources.transfer.staging import Expected, Staging, WantedFile

HttpUrl = Annotated[str, Field(pattern=r"^https?://")]


class RemoteFile(WantedFile):
    """One file at a URL."""

    url: HttpUrl
    """``https://...``."""
    mirrors: tuple[HttpUrl, ...] = ()
    """Other addresses of the same file, tried in this order when the first one fails."""


class Url(Downloaded):
    """Download files over HTTP(S)."""

    source: Literal["url"] = "url"
    files: tuple[RemoteFile, ...] = Field(min_length=1)

    def spec(self) -> dict[str, Any]:
        """The content does not depend on the mirror."""
        spec = super().spec()
        for file in spec["files"]:
            file.pop("mirrors", None)
        return spec

    def wanted(self) -> tuple[WantedFile, ...]:
        return self.files

    def fill(self, staging: Staging) -> dict[str, Any]:
        for file in self.files:
            staging.place(file, partial(_download, (file.url, *file.mirrors)))
        return {}


def _download(urls: tuple[str, ...], target: Path, expected: Expected) -> dict[str, Any]:
    from mmpipe.sources.transfer.download import download

    check_online(urls[0])
    return download(urls, target, expected)
