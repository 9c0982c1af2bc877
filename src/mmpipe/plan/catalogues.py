"""The catalogues of a project: what can be named in recipes and configurations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmpipe import registry
from mmpipe.artifacts.files import canonical_json
from mmpipe.benchmarks.base import get
from mmpipe.benchmarks.published import PublishedTable
from mmpipe.benchmarks.spec import BenchmarkEntry
from mmpipe.data.spec import MixtureSpec
from mmpipe.errors import ConfigError, did_you_mean
from mmpipe.plan.config import Config
from mmpipe.settings import read_mapping, validate
from mmpipe.sources import source_type
from mmpipe.sources.base import Source

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class Catalogues:
    """Backbones, data sets, mixtures and benchmarks, with the choices of one configuration laid over them."""

    def __init__(self, config: Mapping[str, Any], root: Path = Path(), where: str = "config") -> None:
        self.where = where
        self.config: Config = validate(Config, dict(config), where)
        folder = root / "config"
        self.backbones = self._sources(folder / "backbones.yaml")
        self.datasets = self._sources(folder / "datasets.yaml")
        self._check_sources(folder)
        self.mixtures: dict[str, MixtureSpec] = {
            name: validate(MixtureSpec, entry, f"{folder / 'mixtures.yaml'}, mixture '{name}'")
            for name, entry in self._entries(folder / "mixtures.yaml").items()
        }
        self._check_mixtures(folder / "mixtures.yaml")
        self.benchmarks = self._benchmarks(folder / "benchmarks.yaml")
        self._published: dict[str, PublishedTable] = {
            name: validate(PublishedTable, entry, f"{folder / 'published.yaml'}, entry '{name}'")
            for name, entry in (
                read_mapping(folder / "published.yaml") if (folder / "published.yaml").exists() else {}
            ).items()
        }

    @staticmethod
    def _entries(path: Path) -> dict[str, Any]:
        entries = read_mapping(path)
        for name in entries:
            if not NAME.fullmatch(name):
                raise ConfigError(f"{path}: the name '{name}' may hold a-z, 0-9, '.', '_' and '-' only")
        return entries

    def _sources(self, path: Path) -> dict[str, Source]:
        kind = source_type()
        return {name: validate(kind, entry, f"{path}, entry '{name}'") for name, entry in self._entries(path).items()}

    def _check_sources(self, folder: Path) -> None:
        """Data sets may be joined from others, not in a circle; backbones may not."""
        for name, backbone in self.backbones.items():
            if backbone.needs():
                where = f"{folder / 'backbones.yaml'}, entry '{name}'"
                raise ConfigError(f"{where}: only data sets can be of the source '{backbone.kind}'")
            layouts = dict.fromkeys(registry.names("mmpipe.checkpoints.layouts"))
            self._known(backbone.layout, layouts, f"{folder / 'backbones.yaml'}, entry '{name}'", "layout")
        for name, dataset in self.datasets.items():
            if dataset.model_fields_set & {"layout", "subfolder"}:
                where = f"{folder / 'datasets.yaml'}, entry '{name}'"
                raise ConfigError(f"{where}: only backbones have a layout and a subfolder")
            waiting, below = list(self.datasets[name].needs()), set()
            while waiting:
                need = waiting.pop()
                where = f"{folder / 'datasets.yaml'}, entry '{name}'"
                self._known(need, self.datasets, where, "data set")
                if need == name:
                    raise ConfigError(f"{where}: the data set is joined from itself")
                if need not in below:
                    below.add(need)
                    waiting += self.datasets[need].needs()

    def _check_mixtures(self, path: Path) -> None:
        for name, mixture in self.mixtures.items():
            for part in mixture.parts:
                self._known(part.dataset, self.datasets, f"{path}, mixture '{name}'", "data set")

    def _benchmarks(self, path: Path) -> dict[str, BenchmarkEntry]:
        """The catalogue's entries with the overrides of the configuration laid over them."""
        raw = self._entries(path)
        overrides: dict[str, Mapping[str, Any]] = {}
        for chosen in self.config.benchmarks:
            for name, override in chosen.items() if isinstance(chosen, dict) else [(chosen, {})]:
                self._known(name, raw, f"{self.where}: benchmarks", "benchmark")
                overrides[name] = override
        self.chosen_benchmarks = list(overrides)
        entries: dict[str, BenchmarkEntry] = {}
        for name, entry in raw.items():
            where = f"{self.where}: benchmarks.{name}" if overrides.get(name) else f"{path}, entry '{name}'"
            entries[name] = validate(BenchmarkEntry, _overridden(entry or {}, overrides.get(name, {})), where)
            self._known(entries[name].data, self.datasets, f"{where}: data", "data set")
            _check_protocol(entries[name], where, chosen=name in overrides)
        return entries

    @staticmethod
    def _known(name: str, known: Mapping[str, Any], where: str, what: str) -> None:
        if name not in known:
            raise ConfigError(f"{where}: there is no {what} '{name}'{did_you_mean(name, known)}")

    @staticmethod
    def source_spec(source: Source) -> str:
        """What determines the content of a backbone or data set."""
        return canonical_json(source.spec())

    def source_inputs(self, dataset: str) -> list[str]:
        """Manifests of the data sets that a data set is joined from."""
        return [f"resources/datasets/{need}/manifest.json" for need in self.datasets[dataset].needs()]

    def mixture_spec(self, name: str) -> str:
        """What determines the content of a mixture, its data sets' manifests apart."""
        return canonical_json(self.mixtures[name].spec())

    def mixture_inputs(self, name: str) -> list[str]:
        """Manifests of the data sets a mixture reads."""
        return sorted({f"resources/datasets/{part.dataset}/manifest.json" for part in self.mixtures[name].parts})


def _check_protocol(entry: BenchmarkEntry, where: str, chosen: bool) -> None:
    """Raise ConfigError for a task or protocol that does not exist, and for a chosen one that nobody can score."""
    try:
        benchmark = get(entry.task)
        protocol = benchmark.protocol(entry.protocol)
        benchmark.source(Path(), entry.files)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    unjudged = [other.name for other in benchmark.protocols if not other.judged]
    if chosen and entry.scored and protocol.judged and not entry.judge and (entry.protocol or not unjudged):
        way_out = f", take the protocol {' or '.join(unjudged)}" if unjudged else ""
        raise ConfigError(
            f"{where}: the protocol '{protocol.name}' needs a judge model; give the entry a 'judge'{way_out}, or say "
            "'scored: false' to have the answers alone"
        )


def _overridden(entry: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """A benchmark's entry with a configuration's changes; a known number of questions is one of the known files."""
    known = {"questions": None} if {"data", "files"} & set(override) else {}
    return {**entry, **known, **override}
