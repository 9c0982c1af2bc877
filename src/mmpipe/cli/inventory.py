"""The local state of the catalogues' entries: bytes present, bytes to fetch, terms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmpipe.artifacts.manifest import NAME, load
from mmpipe.plan.plan import Plan
from mmpipe.sources.base import Source
from mmpipe.sources.transfer.staging import staged_bytes


@dataclass(frozen=True)
class InventoryItem:
    """An entry of a catalogue and its local state."""

    kind: str
    """``datasets`` or ``backbones``."""
    name: str
    source: Source
    parts: tuple[InventoryItem, ...] = ()
    """Of a joined data set: the data sets to fetch for it, each once, none of them joined."""

    @property
    def directory(self) -> Path:
        return Path("resources", self.kind, self.name)

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        path = self.directory / NAME
        return load(path) if path.is_file() else {}

    @property
    def here(self) -> bool:
        """Whether all of it is present."""
        return bool(self._manifest)

    @cached_property
    def bytes_here(self) -> int:
        """Bytes of the files, unpacked archives included, or of an unfinished fetch."""
        if not self.here:
            return staged_bytes(self.directory)
        if "below" in self._manifest:  # an adopted folder: links have no size
            return int(self._manifest["below"]["size"])
        parts = [*self._manifest["files"].values(), *self._manifest.get("unpacked", {}).values()]
        return sum(part["size"] for part in parts)

    @property
    def announced(self) -> float | None:
        """Bytes as announced by the publisher, 0 for synthetic data; None when unknown."""
        if self.source.kind in ("made", "path"):
            return 0
        return self.source.size_gb * 1e9 if self.source.size_gb else None

    @property
    def to_fetch(self) -> float | None:
        """Bytes still to be fetched; None when unknown."""
        if self.here or self.announced is None:
            return 0 if self.here else None
        return max(0, self.announced - self.bytes_here)

    @property
    def state(self) -> str:
        """``fetched``, ``missing``, ``partial``, ``manual`` (to be downloaded by hand) or the number of parts present."""
        if self.here:
            return "fetched"
        if self.parts:
            return f"{sum(part.here for part in self.parts)} of {len(self.parts)}"
        if self.bytes_here:
            return "partial"
        return "manual" if self.source.kind == "manual" else "missing"

    @property
    def obstacle(self) -> str:
        """Why the fetch needs a manual step; empty when it does not."""
        if self.here:
            return ""
        if how := getattr(self.source, "how", ""):
            return f"a person has to fetch it: {how}"
        if "consent" in self.source.restricted:
            return f"accept its terms at {self.source.homepage} and set HF_TOKEN"
        return ""


class Inventory:
    """The entries of a plan's catalogues."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def item(self, kind: str, name: str) -> InventoryItem:
        """An entry of the catalogue ``kind``."""
        source: Source = getattr(self._plan, kind)[name]
        return InventoryItem(kind, name, source, tuple(self.for_datasets([name])) if source.needs() else ())

    def items(self, kind: str) -> list[InventoryItem]:
        """All entries of a catalogue."""
        return [self.item(kind, name) for name in getattr(self._plan, kind)]

    def for_datasets(self, names: Iterable[str]) -> list[InventoryItem]:
        """The entries to fetch for some data sets, each once."""
        return [self.item("datasets", name) for name in self._plan.fetched_datasets(names)]

    def for_mixture(self, name: str) -> list[InventoryItem]:
        """The entries to fetch for a mixture."""
        return self.for_datasets(part.dataset for part in self._plan.mixtures[name].parts)

    def for_recipe(self, reference: str) -> list[InventoryItem]:
        """The entries to fetch for a recipe's checkpoint: for its stages, those of its teachers, and so on."""
        needed = self._plan.fetched_sources(self._plan.needed(self._plan.checkpoint(reference)))
        return [self.item(kind, name) for kind, name in needed]


@dataclass(frozen=True)
class DownloadSummary:
    """The totals of several entries, each once and none of them joined."""

    items: tuple[InventoryItem, ...]

    @property
    def bytes_here(self) -> int:
        """Bytes present, those of unfinished fetches included."""
        return sum(item.bytes_here for item in self.items)

    @property
    def to_fetch(self) -> float:
        """Bytes still to be fetched, as far as they are known."""
        return sum(item.to_fetch or 0 for item in self.items)

    @property
    def unknown(self) -> list[str]:
        """Entries to be fetched whose size is unknown."""
        return [item.name for item in self.items if item.to_fetch is None]

    @property
    def licences(self) -> dict[str, list[str]]:
        """The entries under each licence, those without one under ``not stated``; synthetic data is left out."""
        return _grouped(
            (item.source.licence or "not stated", item.name)
            for item in self.items
            if item.source.licence or item.source.kind != "made"
        )

    @property
    def restrictions(self) -> dict[str, list[str]]:
        """The entries under each restriction of their use."""
        return _grouped((restriction, item.name) for item in self.items for restriction in item.source.restricted)

    @property
    def obstacles(self) -> dict[str, str]:
        """Entries that need a manual step, and that step."""
        return {item.name: item.obstacle for item in self.items if item.obstacle}


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return groups
