"""Entries that are on this machine already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mmpipe.errors import DataError
from mmpipe.sources.base import Source


class Local(Source):
    """Adopt a directory or a file as it is; nothing is copied, nothing below it is written."""

    source: Literal["path"] = "path"
    path: Path
    """The directory (its entries are linked) or the single file to adopt; ``~`` and ``$VARIABLES`` are expanded."""

    def fetch(self, out: Path, locked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        from mmpipe.fetching.desk import take_possession
        from mmpipe.fetching.space import clear_directory

        origin = Path(os.path.expandvars(self.path)).expanduser().resolve()
        if not origin.exists():
            raise DataError(f"{out}: the path {self.path} does not exist; correct it in the catalogue")
        if origin.is_relative_to(out.resolve()):
            raise DataError(
                f"{out}: the path {self.path} lies in the place of the links to it; move it elsewhere"
            )
        take_possession(out)
        out.mkdir(parents=True, exist_ok=True)
        clear_directory(out)
        try:
            entries = sorted(origin.iterdir()) if origin.is_dir() else [origin]
        except PermissionError as error:
            raise DataError(f"{out}: {origin} cannot be read ({error}); ask for read permission") from error
        for entry in entries:
            if entry.name != "manifest.json":
                (out / entry.name).symlink_to(entry)
        # its size only: a person's own tree is not ours to read in full
        return {"path": origin.as_posix(), "hash_files": False}
