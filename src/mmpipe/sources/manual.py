"""Entries to download by hand: behind a form, a log-in, a licence to accept, or a script of the publisher."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from mmpipe.data.spec import InnerPath
from mmpipe.errors import DataError
from mmpipe.sources.base import Downloaded
from mmpipe.sources.transfer.staging import Expected, Staging, WantedFile


class Manual(Downloaded):
    """Take files from ``resources/manual/<entry>/``; while they are missing, the error explains how to get them."""

    NOTES: ClassVar[frozenset[str]] = Downloaded.NOTES | {"how"}

    source: Literal["manual"] = "manual"
    files: tuple[WantedFile, ...] = ()
    folders: tuple[InnerPath, ...] = ()
    """Folders arranged by the user; they are linked, not copied. Their images are verified by the mixture."""
    how: str
    """Instructions: where to get it and how to place it, in a sentence or two."""

    @model_validator(mode="after")
    def _something(self) -> Manual:
        if not self.files and not self.folders:
            raise ValueError("give 'files' or 'folders'")
        return self

    def wanted(self) -> tuple[WantedFile, ...]:
        return self.files

    def fill(self, staging: Staging) -> dict[str, Any]:
        missing = [file.to for file in self.files if not staging.has(file) and not staging.has_offer(file)]
        missing += [f"{folder}/" for folder in self.folders if not (staging.offered / folder).is_dir()]
        if missing:
            name = staging.offered.name
            raise DataError(
                f"{name}: a person has to fetch this ({self.terms})\n"
                f"  how: {self.how}\n"
                f"  homepage: {self.homepage or '-'}\n"
                f"  put into {staging.offered}/: {', '.join(missing)}\n"
                "and run the same command again. A copy that is laid out already is adopted where it is by the entry\n"
                f"  {name}: {{source: path, path: /where/it/is}}"
            )
        for file in self.files:
            staging.place(file, partial(_gone, staging))
        for folder in self.folders:
            link = staging.files / folder
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to((staging.offered / folder).resolve())
        return {}


def _gone(staging: Staging, target: Path, expected: Expected) -> None:
    raise DataError(f"{staging.offered / target.name}: vanished while it was being taken; put it there again")
