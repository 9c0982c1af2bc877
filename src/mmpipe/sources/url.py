"""Entries downloaded from plain URLs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mmpipe.escapes import redacted
from mmpipe.sources.base import Downloaded, check_online
from mmpipe.sources.transfer.staging import Expected, Staging, WantedFile

HttpUrl = Annotated[str, Field(pattern=r"^https?://")]


class RemoteFile(WantedFile):
    """One file at a URL."""

    url: HttpUrl
    """``https://...``; ``${NAME}`` in it is a variable of the environment, e.g. a token."""
    mirrors: tuple[HttpUrl, ...] = ()
    """Other addresses of the same file, tried in this order when the first one fails."""


class Url(Downloaded):
    """Download files over HTTP(S)."""

    NOTES: ClassVar[frozenset[str]] = Downloaded.NOTES | {"max_gb"}

    source: Literal["url"] = "url"
    files: tuple[RemoteFile, ...] = Field(min_length=1)
    max_gb: float = Field(200, gt=0)
    """A file without ``size`` is not taken beyond this, as a server may send without end."""

    def spec(self) -> dict[str, Any]:
        """The content does not depend on the mirror; secrets of an address are left out."""
        spec = super().spec()
        for file in spec["files"]:
            file.pop("mirrors", None)
            file["url"] = redacted(file["url"], environment=False)
        return spec

    def wanted(self) -> tuple[WantedFile, ...]:
        return self.files

    def fill(self, staging: Staging) -> dict[str, Any]:
        for file in self.files:
            staging.place(file, partial(_download, (file.url, *file.mirrors), self.max_gb * 1e9))
        return {}


def _download(urls: tuple[str, ...], most: float, target: Path, expected: Expected) -> dict[str, Any]:
    from mmpipe.sources.transfer.download import download

    check_online(urls[0])
    return download(urls, target, expected, most=most)
