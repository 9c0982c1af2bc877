"""Data sets joined from other entries by links, without copies."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mmpipe.data.spec import InnerPath, listed
from mmpipe.errors import DataError
from mmpipe.sources.base import Source
from mmpipe.sources.transfer.staging import claim_output, empty_directory

_listed = BeforeValidator(listed, json_schema_input_type=str | list[str])


class Joined(Source):
    """Arrange other data sets in the folders that annotations expect."""

    source: Literal["joined"] = "joined"
    parts: dict[InnerPath, Annotated[tuple[InnerPath, ...], Field(min_length=1), _listed]] = Field(min_length=1)
    """Folder here -> data set (``gqa: gqa-images``) or something inside one (``coco/train2017:
    coco-train2017/train2017``). Several data sets for one folder are merged."""

    def needs(self) -> tuple[str, ...]:
        return tuple(sorted({PurePosixPath(path).parts[0] for paths in self.parts.values() for path in paths}))

    def fetch(self, out: Path, locked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        claim_output(out)
        empty_directory(out)
        for place, origins in self.parts.items():
            for origin in origins:
                _lay(out.parent / origin, out / place, alone=len(origins) == 1 and place != ".")
        return {"files": {}}


def _lay(origin: Path, place: Path, alone: bool) -> None:
    """Make ``place`` a link to ``origin``; unless it is ``alone`` there, a folder of links to its entries."""
    if not origin.exists():
        raise DataError(f"{place}: there is no {origin} to link to; correct 'parts' in the catalogue")
    if alone:
        return _link(origin, place)
    for entry in sorted(origin.iterdir()):
        if entry.name != "manifest.json":
            _link(entry, place / entry.name)


def _link(origin: Path, place: Path) -> None:
    if place.is_symlink() or place.exists():
        raise DataError(f"{place}: two of the 'parts' in the catalogue want this place; {origin} is the second")
    place.parent.mkdir(parents=True, exist_ok=True)
    # Relative, so that the tree can be moved or mounted elsewhere.
    place.symlink_to(os.path.relpath(origin.absolute(), place.parent.absolute()))
