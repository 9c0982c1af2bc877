"""The lock: the version of each entry at its first fetch, which later fetches elsewhere must match.

``config/lock.json`` is written by ``mmpipe data --lock`` from the manifests on this machine and belongs under version
control. It pins what a catalogue leaves open: branches of hub repositories, and files without a published hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import read_object, write_json
from mmpipe.artifacts.manifest import NAME, load
from mmpipe.settings import validate

LOCK = Path("config/lock.json")


def locked(kind: str, name: str, path: Path = LOCK) -> dict[str, Any]:
    """The lock's facts about an entry (``kind``: ``backbones`` or ``datasets``); empty for an unlocked one."""
    return _read(path).get(kind, {}).get(name, {})


def write_lock(names: Mapping[str, Mapping[str, Any]], path: Path = LOCK) -> list[str]:
    """Add every fetched entry that is not locked yet; entries no longer in the catalogue are removed. ``names``
    gives the catalogue's entries by kind. Returns the entries added."""
    old = _read(path)
    lock: dict[str, dict[str, Any]] = {}
    added = []
    for kind, entries in names.items():
        lock[kind] = {name: pins for name, pins in old.get(kind, {}).items() if name in entries}
        for name in sorted(set(entries) - set(lock[kind])):
            manifest = Path("resources", kind, name, NAME)
            if pins := _pins(manifest):
                lock[kind][name] = pins
                added.append(f"{kind}/{name}")
        lock[kind] = dict(sorted(lock[kind].items()))
    write_json(path, lock)
    return added


def _read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The lock's entries by kind and name. Raises ConfigError for a damaged file."""
    kind = dict[str, dict[str, dict[str, Any]]]
    entries: dict[str, dict[str, dict[str, Any]]] = validate(
        kind, read_object(path) if path.is_file() else {}, str(path)
    )
    return entries


def _pins(manifest: Path) -> dict[str, Any]:
    """The facts that pin a manifest's content: a commit, or the hashes of all downloads."""
    facts = load(manifest) if manifest.is_file() else {}
    if "commit" in facts:
        return {"commit": facts["commit"]}
    if "unpacked" not in facts:
        return {}  # synthetic, linked or adopted: without downloads
    archives = [contents["archives"] for contents in facts["unpacked"].values()]
    return {"downloads": {name: pin for files in (facts["files"], *archives) for name, pin in files.items()}}
