"""Local entries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mmpipe.errors import DataError
from mmpipe.sources.base import Source
from mmpipe.sources.transfer.staging import claim_output, empty_directory


class Local(Source):
    """Adopt a directory or a file by links, without copying it or writing into it. The manifest records the number of
    files and their size; later changes are detected only when it is adopted again."""

    source: Literal["path"] = "path"
    path: Path
    """The directory (its entries are linked) or the single file to adopt; ``~`` and ``$VARIABLES`` are expanded."""

    def fetch(self, out: Path, locked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        origin = Path(os.path.expandvars(self.path)).expanduser().resolve()
        if not origin.exists():
            raise DataError(f"{out}: the path {self.path} does not exist; correct it in the catalogue")
        if origin.is_relative_to(out.resolve()):
            raise DataError(f"{out}: the path {self.path} lies in the place of the links to it; move it elsewhere")
        claim_output(out)
        empty_directory(out)
        try:
            entries = sorted(origin.iterdir()) if origin.is_dir() else [origin]
        except PermissionError as error:
            raise DataError(f"{out}: {origin} cannot be read ({error}); ask for read permission") from error
        for entry in entries:
            if entry.name != "manifest.json":
                (out / entry.name).symlink_to(entry)
        # sizes only: the user's own tree may be too large to hash
        return {"path": origin.as_posix(), "below": _measured(origin), "hash_files": False}


def _measured(origin: Path) -> dict[str, int]:
    """Number and bytes of the files in a tree, links to other trees followed."""
    if origin.is_file():
        return {"files": 1, "size": origin.stat().st_size}
    files = size = 0
    seen = set()
    for place, folders, names in os.walk(origin, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in seen]
        for path in (Path(place, name) for name in names):
            if path.is_file():  # not a dangling link
                files, size = files + 1, size + path.stat().st_size
    return {"files": files, "size": size}
