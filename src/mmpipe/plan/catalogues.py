"""The catalogues of a project: the entries that recipes and configurations can name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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
from mmpipe.settings import read_mapping, todays_keys, validate
from mmpipe.sources import source_type
from mmpipe.sources.base import Source

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def check_known(name: str, known: Iterable[str], where: str, what: str) -> None:
    """Raise ConfigError, opened by ``where``, for a ``what`` that is not ``known``."""
    if name not in known:
        raise ConfigError(f"{where}: there is no {what} '{name}'{did_you_mean(name, known)}")


class Catalogues:
    """Backbones, data sets, mixtures, benchmarks and published tables of ``config/*.yaml`` below ``root``.

    ``config``, named ``where`` in messages, chooses benchmarks and may override their entries.
    Raises ConfigError, naming file and entry.
    """

    def __init__(self, config: Config, root: Path, where: str) -> None:
        self._folder = root / "config"
        self.backbones: dict[str, Source] = self._read("backbones", source_type())
        self.datasets: dict[str, Source] = self._read("datasets", source_type())
        self.mixtures: dict[str, MixtureSpec] = self._read("mixtures", MixtureSpec, "mixture")
        published = self._folder / "published.yaml"
        self.published: dict[str, PublishedTable] = {
            name: validate(PublishedTable, entry, f"{published}, entry '{name}'")
            for name, entry in (read_mapping(published) if published.exists() else {}).items()
        }
        self._check_backbones()
        self._check_datasets()
        for name, mixture in self.mixtures.items():
            for source in mixture.parts:
                check_known(source.dataset, self.datasets, self._place("mixtures", name, "mixture"), "data set")
        self.chosen_benchmarks, self.benchmarks = self._read_benchmarks(config, where)

    def _entries(self, catalogue: str) -> dict[str, Any]:
        path = self._folder / f"{catalogue}.yaml"
        entries = read_mapping(path)
        for name in entries:
            if not NAME.fullmatch(name):
                raise ConfigError(f"{path}: the name '{name}' may hold a-z, 0-9, '.', '_' and '-' only")
        return entries

    def _read(self, catalogue: str, kind: Any, what: str = "entry") -> dict[str, Any]:
        return {
            name: validate(kind, entry, self._place(catalogue, name, what))
            for name, entry in self._entries(catalogue).items()
        }

    def _place(self, catalogue: str, name: str, what: str = "entry") -> str:
        return f"{self._folder / catalogue}.yaml, {what} '{name}'"

    def _check_backbones(self) -> None:
        """Backbones have a known layout and are not joined from others."""
        layouts = registry.names("mmpipe.checkpoints.layouts")
        for name, backbone in self.backbones.items():
            where = self._place("backbones", name)
            if backbone.needs():
                raise ConfigError(f"{where}: only data sets can be of the source '{backbone.kind}'")
            check_known(backbone.layout, layouts, where, "layout")

    def _check_datasets(self) -> None:
        """Data sets have no layout; they may be joined from others, not in a circle."""
        for name, dataset in self.datasets.items():
            where = self._place("datasets", name)
            if dataset.model_fields_set & {"layout", "subfolder"}:
                raise ConfigError(f"{where}: only backbones have a layout and a subfolder")
            waiting, below = list(dataset.needs()), set()
            while waiting:
                need = waiting.pop()
                check_known(need, self.datasets, where, "data set")
                if need == name:
                    raise ConfigError(f"{where}: the data set is joined from itself")
                if need not in below:
                    below.add(need)
                    waiting += self.datasets[need].needs()

    def _read_benchmarks(self, config: Config, where: str) -> tuple[list[str], dict[str, BenchmarkEntry]]:
        """The chosen benchmarks, and all entries with the overrides of the configuration."""
        raw = self._entries("benchmarks")
        overrides: dict[str, Mapping[str, Any]] = {}
        for chosen in config.benchmarks:
            overrides |= chosen if isinstance(chosen, dict) else {chosen: {}}
        if not overrides:
            raise ConfigError(f"{where}: benchmarks: no benchmark is named")
        for name in overrides:
            check_known(name, raw, f"{where}: benchmarks", "benchmark")
        entries: dict[str, BenchmarkEntry] = {}
        for name, entry in raw.items():
            changes = overrides.get(name, {})
            place = f"{where}: benchmarks.{name}" if changes else self._place("benchmarks", name)
            content, changes = (todays_keys(BenchmarkEntry, values or {}, place) for values in (entry, changes))
            if {"data", "files"} & set(changes):
                content.pop("questions", None)  # the number of questions is a fact of the catalogue's files
            entries[name] = validate(BenchmarkEntry, content | changes, place)
            check_known(entries[name].data, self.datasets, f"{place}: data", "data set")
            _check_protocol(entries[name], place, chosen=name in overrides)
        return list(overrides), entries

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
        return sorted({f"resources/datasets/{source.dataset}/manifest.json" for source in self.mixtures[name].parts})

    def fetched_datasets(self, names: Iterable[str]) -> list[str]:
        """The data sets that must be fetched for some data sets: in place of a joined one, those it is joined from."""
        waiting, found = list(names), set()
        while waiting:
            name = waiting.pop()
            waiting += (needs := self.datasets[name].needs())
            found |= set() if needs else {name}
        return sorted(found)

    def backbone_directory(self, name: str) -> Path:
        """The directory of a backbone's files."""
        return Path("resources/backbones", name, self.backbones[name].subfolder or "")

    def layouts(self, backbones: Mapping[str, str]) -> dict[str, str]:
        """The checkpoint layouts of backbones by role, transformers' own left out."""
        named = {role: self.backbones[name].layout for role, name in backbones.items()}
        return {role: layout for role, layout in named.items() if layout != "hf"}

    def subfolders(self, backbones: Mapping[str, str]) -> dict[str, str]:
        """The subfolders of backbones by role, where they have one."""
        named = {role: self.backbones[name].subfolder for role, name in backbones.items()}
        return {role: folder for role, folder in named.items() if folder}


def _check_protocol(entry: BenchmarkEntry, where: str, chosen: bool) -> None:
    """Raise ConfigError for an unknown task or protocol, and for a chosen one that lacks its judge."""
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
