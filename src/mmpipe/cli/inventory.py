"""What of the catalogues is on this machine, how much is still to come, under which terms, and what stands in the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import read_json
from mmpipe.artifacts.manifest import NAME
from mmpipe.plan.plan import Plan
from mmpipe.sources.base import Source
from mmpipe.sources.transfer.staging import staged_bytes


@dataclass(frozen=True)
class Holding:
    """An entry of a catalogue, as far as it is here."""

    kind: str
    """``datasets`` or ``backbones``."""
    name: str
    source: Source
    parts: tuple[Holding, ...] = ()
    """Of a joined data set: what must be fetched for it, each once, itself not joined."""

    @property
    def directory(self) -> Path:
        return Path("resources", self.kind, self.name)

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        path = self.directory / NAME
        manifest: dict[str, Any] = read_json(path) if path.is_file() else {}
        return manifest

    @property
    def here(self) -> bool:
        """Whether all of it is here."""
        return bool(self._manifest)

    @cached_property
    def came(self) -> int:
        """Bytes that are here: of the files and what came out of archives, or of an unfinished fetch."""
        if not self.here:
            return staged_bytes(self.directory)
        if "below" in self._manifest:  # adopted: links do not tell
            return int(self._manifest["below"]["size"])
        parts = [*self._manifest["files"].values(), *self._manifest.get("unpacked", {}).values()]
        return sum(part["size"] for part in parts)

    @property
    def announced(self) -> float | None:
        """Bytes its publishers name, nothing for what is made here; None when nobody says."""
        if self.source.kind in ("made", "path"):
            return 0
        return self.source.size_gb * 1e9 if self.source.size_gb else None

    @property
    def to_come(self) -> float | None:
        """Bytes still to be fetched; None when nobody says how many."""
        if self.here or self.announced is None:
            return 0 if self.here else None
        return max(0, self.announced - self.came)

    @property
    def state(self) -> str:
        """``fetched``, ``missing``, ``partial``, ``manual`` (a person has to fetch it) or how many parts are here."""
        if self.here:
            return "fetched"
        if self.parts:
            return f"{sum(part.here for part in self.parts)} of {len(self.parts)}"
        if self.came:
            return "partial"
        return "manual" if self.source.kind == "manual" else "missing"

    @property
    def obstacle(self) -> str:
        """Why the fetch will stop and wait for a person; empty when it will not."""
        if self.here:
            return ""
        if how := getattr(self.source, "how", ""):
            return f"a person has to fetch it: {how}"
        if "consent" in self.source.restricted:
            return f"accept its terms at {self.source.homepage} and set HF_TOKEN"
        return ""


def holding(plan: Plan, kind: str, name: str) -> Holding:
    """An entry of the catalogue ``kind``."""
    source: Source = getattr(plan, kind)[name]
    below = [holding(plan, "datasets", need) for need in source.needs()]
    leaves = {part.name: part for one in below for part in one.parts or (one,)}
    return Holding(kind, name, source, tuple(leaves[leaf] for leaf in sorted(leaves)))


def holdings(plan: Plan, kind: str) -> list[Holding]:
    """All entries of a catalogue."""
    return [holding(plan, kind, name) for name in getattr(plan, kind)]


def of_datasets(plan: Plan, names: Iterable[str]) -> list[Holding]:
    """What must be fetched for some data sets, each entry once."""
    every = [holding(plan, "datasets", name) for name in names]
    leaves = {part.name: part for one in every for part in one.parts or (one,)}
    return [leaves[name] for name in sorted(leaves)]


def of_mixture(plan: Plan, name: str) -> list[Holding]:
    """What must be fetched for a mixture."""
    return of_datasets(plan, (part.dataset for part in plan.mixtures[name].parts))


def of_recipe(plan: Plan, reference: str) -> list[Holding]:
    """What must be fetched to make a recipe's checkpoint: for its stages, those of its teachers, and so on."""
    stages = plan.needed(plan.checkpoint(reference))
    mixtures = {mixture for stage in stages if (mixture := stage.settings.mixture())}
    backbones = {name for stage in stages for name in stage.backbones().values()}
    datasets = [part.dataset for mixture in mixtures for part in plan.mixtures[mixture].parts]
    return [*(holding(plan, "backbones", name) for name in sorted(backbones)), *of_datasets(plan, datasets)]


@dataclass(frozen=True)
class Bill:
    """What several entries come to."""

    entries: tuple[Holding, ...]
    """None of them joined, each once."""

    @property
    def here(self) -> int:
        """Bytes that are here, those of unfinished fetches too."""
        return sum(entry.came for entry in self.entries)

    @property
    def to_come(self) -> float:
        """Bytes still to be fetched, as far as publishers name them."""
        return sum(entry.to_come or 0 for entry in self.entries)

    @property
    def unknown(self) -> list[str]:
        """Entries to be fetched of which nobody says how large they are."""
        return [entry.name for entry in self.entries if entry.to_come is None]

    @property
    def licences(self) -> dict[str, list[str]]:
        """The entries under each licence, those without one under ``not stated``; what is made here has none."""
        found: dict[str, list[str]] = {}
        for entry in self.entries:
            if entry.source.licence or entry.source.kind != "made":
                found.setdefault(entry.source.licence or "not stated", []).append(entry.name)
        return found

    @property
    def restrictions(self) -> dict[str, list[str]]:
        """The entries under each restriction of their use."""
        found: dict[str, list[str]] = {}
        for entry in self.entries:
            for restriction in entry.source.restricted:
                found.setdefault(restriction, []).append(entry.name)
        return found

    @property
    def obstacles(self) -> dict[str, str]:
        """Entries that will not come without a person, and what that person has to do."""
        return {entry.name: entry.obstacle for entry in self.entries if entry.obstacle}
