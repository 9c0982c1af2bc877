"""The check of artifacts on the disk against the hashes in their manifests, and its report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmpipe.artifacts import manifest
from mmpipe.errors import ArtifactError

ROOTS = (Path("results"), Path("resources"))


@dataclass(frozen=True)
class Verified:
    """The state of an artifact. Files in linked folders and of unpacked archives are not listed in a manifest."""

    directory: Path
    files: int = 0
    unhashed: int = 0
    """Files whose size alone is listed."""
    unlisted: bool = False
    faults: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.faults:
            return "\n".join([f"{self.directory}: DAMAGED", *(f"  {fault}" for fault in self.faults)])
        parts = [f"{self.files - self.unhashed} files hashed"]
        parts += [f"{self.unhashed} by size alone"] * bool(self.unhashed)
        parts += ["linked or unpacked ones not hashed"] * self.unlisted
        return f"{self.directory}: OK ({', '.join(parts)})"


def verify(directory: Path, *, cache: bool = True) -> Verified:
    """Check all files of an artifact. ``cache=False`` reads files again that were hashed before."""
    try:
        card = manifest.load(directory / manifest.NAME)
        files = card["files"]
        unhashed = sum("sha256" not in facts for facts in files.values())
        found = tuple(manifest.faults(directory, files, cache=cache))
        unlisted = bool(card.get("unpacked")) or any(
            path.is_symlink() and path.is_dir() for path in directory.iterdir()
        )
        return Verified(directory, len(files), unhashed, unlisted, found)
    except ArtifactError as error:
        return Verified(directory, faults=(str(error),))


def find_artifacts(places: Sequence[Path]) -> list[Path]:
    """The directories with a manifest at or below ``places``. Raises ArtifactError for a place without one."""
    found: dict[Path, None] = {}
    for place in places:
        directory = place.parent if place.name == manifest.NAME else place
        below = sorted(_below(directory))
        if not below:
            raise ArtifactError(f"{place}: no {manifest.NAME} at or below it; name an artifact, or a folder of some")
        found.update(dict.fromkeys(below))
    return list(found)


def print_verified(places: Sequence[Path], *, cache: bool = True) -> bool:
    """Print a line for each artifact, more for a damaged one; whether all are as they were published."""
    artifacts = find_artifacts(places or [root for root in ROOTS if root.is_dir()])
    damaged = 0
    for directory in artifacts:
        state = verify(directory, cache=cache)
        damaged += bool(state.faults)
        print(state, flush=True)
    print(f"{len(artifacts)} artifacts, {damaged} damaged")
    return not damaged


def _below(directory: Path) -> Iterator[Path]:
    seen = set()
    for place, folders, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        seen.add(real)
        if manifest.NAME in names:
            folders.clear()  # all of it is in its manifest
            yield Path(place)
