"""Entries that a person has to fetch: behind a form, a log-in, a licence to accept, or a script of the publisher."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mmpipe.errors import DataError
from mmpipe.sources.base import Desk, Downloaded, WantedFile

if TYPE_CHECKING:
    from mmpipe.fetching.http import Expected


class Manual(Downloaded):
    """Take files that a person put into ``resources/manual/<entry>/``; until then, say how to get them."""

    source: Literal["manual"] = "manual"
    files: tuple[WantedFile, ...] = Field(min_length=1)
    how: str
    """From where to get the files, in a sentence or two."""

    NOTES = Downloaded.NOTES | {"how"}

    def bring(self, desk: Desk) -> dict[str, Any]:
        missing = [
            file.to
            for file in self.files
            if file.to not in desk.done["downloads"] and not desk.has_offer(file)
        ]
        if missing:
            raise DataError(
                f"{desk.offered.name}: a person has to fetch this ({self.licence or 'licence: see its homepage'}).\n"
                f"  {self.how}\n"
                f"  homepage: {self.homepage or '-'}\n"
                f"  put into {desk.offered}/: {', '.join(missing)}\n"
                "and run the same command again. A copy on disk that is laid out already is adopted by\n"
                f"  {desk.offered.name}: {{source: path, path: /where/it/is}}"
            )
        for file in self.files:
            desk.place(file, partial(_gone, desk))
        return {}


def _gone(desk: Desk, target: Path, expected: Expected) -> None:
    raise DataError(f"{desk.offered / target.name}: vanished while it was being taken; put it there again")
