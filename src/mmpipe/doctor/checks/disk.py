"""Room on the disks of resources and results against what the plan still puts there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from mmpipe.doctor.base import Finding, Machine
from mmpipe.doctor.needs import checkpoint_bytes, missing_sources
from mmpipe.sources.transfer.progress import format_size

_TIGHT = 10e9
"""Bytes below which a disk is called nearly full whatever is planned."""


def check(machine: Machine) -> Iterator[Finding]:
    yield _room(machine.root, "resources", _to_fetch(machine), "what is still to be fetched")
    yield _room(machine.root, "results", checkpoint_bytes(machine), "checkpoints still to be made")


def _to_fetch(machine: Machine) -> float:
    """Bytes of missing entries whose size is known; an archive and its contents are there at the same time."""
    return sum(
        (source.size_gb or 0) * 1e9 * (2 if getattr(source, "unpack", None) else 1)
        for source in missing_sources(machine).values()
    )


def _room(root: Path, name: str, needed: float, what: str) -> Finding:
    folder = root / name
    free = shutil.disk_usage(folder if folder.is_dir() else root).free
    seen = f"{name}/: {format_size(free)} free" + (f", about {format_size(needed)} needed for {what}" if needed else "")
    link = f"free some space, or make '{name}' a link to a larger disk"
    if needed > free:
        return Finding("problem", seen, link)
    return Finding("warning" if free - needed < _TIGHT else "ok", seen, link if free - needed < _TIGHT else "")
