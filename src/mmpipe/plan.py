"""The plan: recipes resolved into stages, their owners, specs and paths.

Plain Python on plain data: no torch, no transformers, no Snakemake. Everything the rules ask is answered here, and everything
that can be wrong in the configuration is found here, before any job starts.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmpipe import registry
from mmpipe.analysis.plan import ExpertLogs
from mmpipe.artifacts.files import canonical_json, sha256
from mmpipe.benchmarks.base import get
from mmpipe.benchmarks.published import PublishedTable
from mmpipe.benchmarks.published import rows as published_rows
from mmpipe.benchmarks.spec import BenchmarkEntry
from mmpipe.config.loader import read_mapping, validate
from mmpipe.config.models import Config, Recipe
from mmpipe.data.spec import MixtureSpec
from mmpipe.errors import ConfigError, did_you_mean
from mmpipe.registry import source_file
from mmpipe.savings import Savings
from mmpipe.sources import source_type
from mmpipe.sources.base import Source
from mmpipe.stages import stage_kinds
from mmpipe.stages.base import Annotation, Encoding, Hardware, Stage, StageJob, VisionLanguage
from mmpipe.variants import Variant, split

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
CONSTRUCT = "construct"
"""The stage that brings a whole checkpoint in; put before the others where a recipe does not name it."""
_RESERVED = {"overlap", "smoke", "eval", "submit", "report", "leaderboard"}


@dataclass(frozen=True)
class StagePlan:
    """One stage of a recipe, resolved. ``owner`` is the recipe whose directory holds the checkpoint."""

    owner: str
    name: str
    kind: str
    settings: Stage
    vision_language: VisionLanguage
    parent: StagePlan | None
    where: str
    """The recipe file, for messages."""
    answering: Hardware = field(default_factory=Hardware)
    """What answering benchmarks with this checkpoint runs on."""

    @property
    def id(self) -> str:
        """``owner@stage``."""
        return f"{self.owner}@{self.name}"

    def directory(self, out: str = "results") -> Path:
        """The stage's directory below ``out``."""
        return Path(out, self.owner, self.name)

    def manifest(self, out: str = "results") -> Path:
        """The manifest of the published checkpoint."""
        return self.directory(out) / "model" / "manifest.json"

    @property
    def weights(self) -> str:
        """File name of the published weights."""
        return f"{self.settings.PUBLISHES}.safetensors"

    @property
    def sparsified(self) -> bool:
        """Whether the checkpoint has predictors of what to keep."""
        return any(stage.settings.SPARSIFIES for stage in self.path())

    def path(self) -> list[StagePlan]:
        """This stage and all before it, first one first."""
        return [*(self.parent.path() if self.parent else []), self]

    @property
    def sparse(self) -> bool:
        """Whether the checkpoint has experts."""
        return any(stage.settings.grows_experts() for stage in self.path())


@dataclass(frozen=True)
class TokensPlan:
    """A mixture in the tokens of one model, for all stages that read it so."""

    mixture: str
    encoding: Encoding
    model: Mapping[str, Any]
    """What the tokenizer and the number of a picture's tokens come from."""
    vision_language: VisionLanguage
    manifests: Mapping[str, Path]
    directories: Mapping[str, Path]
    """A published ``checkpoint``, or the ``vision`` and ``language`` backbones."""
    layouts: Mapping[str, str]

    def spec(self) -> str:
        """What determines the tokens, the inputs' manifests apart."""
        return canonical_json(
            {
                "mixture": self.mixture,
                "model": dict(self.model),
                "template": self.encoding.template,
                "max_length": self.encoding.max_length,
            }
        )

    @property
    def key(self) -> str:
        """``mixture/hash``."""
        return f"{self.mixture}/{hashlib.sha256(self.spec().encode()).hexdigest()[:12]}"

    @property
    def directory(self) -> Path:
        """Where the tokens are."""
        return Path("resources/tokens", self.key)

    def inputs(self) -> dict[str, Path]:
        """The manifests the tokens are made from, by role."""
        return {"mixture": Path("resources/mixtures", self.mixture, "manifest.json"), **self.manifests}


class Plan:
    """All recipes, catalogues and choices of one configuration.

    ``config`` is the content of the main configuration file, ``root`` the project directory that holds ``config/``.
    Raises ConfigError, naming file and key, for anything that cannot be carried out.
    """

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
        self._recipes = _read_recipes(folder / "recipes")
        self._paths: dict[str, list[StagePlan]] = {}
        self._inherited: dict[str, _Inherited] = {}
        for name in self._recipes:
            self._resolve(name, ())
        self._check_names()
        self._check_references()
        self._check_nodes()
        self.expert_logs = ExpertLogs(self)
        self.benchmarks |= self.expert_logs.variants
        self.savings = Savings(self)

    # --- catalogues -----------------------------------------------------------------------------------------------

    @staticmethod
    def _entries(path: Path) -> dict[str, Any]:
        entries = read_mapping(path)
        for name in entries:
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{path}: the name '{name}' may hold a-z, 0-9, '.', '_' and '-' only")
        return entries

    def _sources(self, path: Path) -> dict[str, Source]:
        kind = source_type()
        return {
            name: validate(kind, entry, f"{path}, entry '{name}'")
            for name, entry in self._entries(path).items()
        }

    def _check_sources(self, folder: Path) -> None:
        """Data sets may be joined from others, not in a circle; backbones may not."""
        for name, backbone in self.backbones.items():
            if backbone.needs():
                where = f"{folder / 'backbones.yaml'}, entry '{name}'"
                raise ConfigError(f"{where}: only data sets can be of the source '{backbone.kind}'")
            layouts = dict.fromkeys(registry.names("mmpipe.lineage"))
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

    # --- recipes --------------------------------------------------------------------------------------------------

    def _resolve(self, name: str, below: tuple[str, ...]) -> list[StagePlan]:
        """The stages of recipe ``name``, first to last."""
        if name in self._paths:
            return self._paths[name]
        recipe = self._recipes[name]
        if name in below:
            circle = " -> ".join([*below[below.index(name) :], name])
            raise ConfigError(f"{recipe.where}: 'extends' goes round in a circle: {circle}")
        inherited: list[StagePlan] = []
        common = _Inherited()
        if recipe.settings.extends:
            parent, _, last = recipe.settings.extends.partition("@")
            self._known(parent, self._recipes, f"{recipe.where}: extends", "recipe")
            inherited = self._resolve(parent, (*below, name))
            if last:
                names = [stage.name for stage in inherited]
                self._known(last, dict.fromkeys(names), f"{recipe.where}: extends", f"stage of '{parent}'")
                inherited = inherited[: names.index(last) + 1]
            common = self._inherited[parent]
        self._inherited[name] = _Inherited(
            _merged(common.defaults, recipe.settings.defaults),
            _merged(common.hardware, recipe.settings.hardware),
        )
        self._paths[name] = self._path(name, recipe, inherited)
        return self._paths[name]

    def _path(self, name: str, recipe: _NamedRecipe, inherited: list[StagePlan]) -> list[StagePlan]:
        """The inherited stages up to the first that changes, then everything this recipe owns."""
        own = recipe.settings.stages
        vision_language = recipe.settings.model or (inherited[-1].vision_language if inherited else None)
        if vision_language is None:
            raise ConfigError(
                f"{recipe.where}: the key 'model' is missing; name its vision and language backbone"
            )
        for role, backbone in vision_language.parts().items():
            self._known(backbone, self.backbones, f"{recipe.where}: model.{role}", "backbone")
        keeps_model = not inherited or vision_language == inherited[0].vision_language
        kept = list(itertools.takewhile(lambda stage: keeps_model and stage.name not in own, inherited))
        repeated = inherited[len(kept) :]
        order = [stage.name for stage in repeated] + [n for n in own if n not in {s.name for s in repeated}]
        if vision_language.checkpoint and not kept:
            # a whole model is brought into the house before anything reads it
            order = list(dict.fromkeys([CONSTRUCT, *order]))
        if not kept and not order:
            raise ConfigError(f"{recipe.where}: the recipe has no stages")
        before = {stage.name: stage for stage in repeated}
        path = kept
        for stage_name in order:
            base = before[stage_name].settings.model_dump(exclude_unset=True) if stage_name in before else {}
            stage = self._stage(name, stage_name, recipe, base, before.get(stage_name))
            path = [
                *path,
                StagePlan(
                    owner=name,
                    name=stage_name,
                    kind=stage[0],
                    settings=stage[1],
                    vision_language=vision_language,
                    parent=path[-1] if path else None,
                    where=recipe.where,
                    answering=recipe.settings.answering
                    or (inherited[0].answering if inherited else Hardware()),
                ),
            ]
        return path

    def _stage(
        self, owner: str, name: str, recipe: _NamedRecipe, base: dict[str, Any], before: StagePlan | None
    ) -> tuple[str, Stage]:
        where = f"{recipe.where}: stages.{name}"
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in _RESERVED:
            raise ConfigError(
                f"{where}: a stage name holds a-z, 0-9 and '_' and is none of {sorted(_RESERVED)}"
            )
        own = dict(recipe.settings.stages.get(name) or {})
        kind = own.pop("kind", before.kind if before else name)
        self._known(kind, stage_kinds(), where, "stage")
        fields = stage_kinds()[kind].model_fields
        self._check_defaults(recipe)
        # a repeated stage carries what the parent's defaults gave it
        common = self._inherited[owner] if before is None else recipe.settings
        defaults = {key: value for key, value in common.defaults.items() if key in fields}
        shared = {
            key: value
            for key, value in common.hardware.items()
            if key not in ("gpus", "nodes") or stage_kinds()[kind].ON_GPUS
        }
        hardware = _merged(shared, own.get("hardware", {}))
        raw = _merged(_merged(base, defaults), own)
        if hardware:
            raw["hardware"] = _merged(base.get("hardware", {}), hardware)
        settings: Stage = validate(stage_kinds()[kind], raw, where)
        mixture = settings.mixture()
        if mixture is not None:
            self._known(mixture, self.mixtures, f"{where}.data", "mixture")
        return kind, settings

    @staticmethod
    def _check_defaults(recipe: _NamedRecipe) -> None:
        known = {field for kind in stage_kinds().values() for field in kind.model_fields}
        for key in recipe.settings.defaults:
            if key not in known:
                raise ConfigError(f"{recipe.where}: unknown key 'defaults.{key}'{did_you_mean(key, known)}")

    def _check_names(self) -> None:
        for name, recipe in self._recipes.items():
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"{recipe.where}: the recipe name '{name}' may hold a-z, 0-9, '.', '_', '-' only"
                )
            if name in self.benchmarks or name in _RESERVED:
                raise ConfigError(
                    f"{recipe.where}: the recipe name '{name}' is taken (a benchmark or a folder of results/); "
                    "rename the recipe"
                )

    def _check_references(self) -> None:
        for stage in self.stages():
            for role, reference in _all_references(stage.settings).items():
                if split(reference, f"{stage.where}: stages.{stage.name}.{role}")[1]:
                    raise ConfigError(
                        f"{stage.where}: stages.{stage.name}.{role}: '{reference}': variants answer benchmarks only"
                    )
                other = self.checkpoint(reference, f"{stage.where}: stages.{stage.name}.{role}")
                self._check_no_circle(stage, other, role)
        self.chosen_recipes  # noqa: B018 - an unknown name in the configuration is found here

    def _check_no_circle(self, stage: StagePlan, other: StagePlan, role: str) -> None:
        """A stage must not need itself through its references."""
        waiting, seen = [other], set()
        while waiting:
            current = waiting.pop()
            if current.id in seen:
                continue
            seen.add(current.id)
            if current.id == stage.id:
                raise ConfigError(f"{stage.where}: stages.{stage.name}.{role} depends on this stage itself")
            needed = [self.checkpoint(name, "") for name in _all_references(current.settings).values()]
            waiting += [*needed, *([current.parent] if current.parent else [])]

    def _check_nodes(self) -> None:
        for stage in self.stages():
            for hardware in (stage.settings.hardware, stage.answering):
                try:
                    self.nodes(hardware)
                except ConfigError as error:
                    raise ConfigError(f"{stage.where}: stages.{stage.name}: {error}") from None

    # --- what the rules ask ---------------------------------------------------------------------------------------

    @property
    def recipes(self) -> list[str]:
        """All recipe names."""
        return list(self._paths)

    def nodes(self, hardware: Hardware) -> int:
        """How many machines of the cluster a job runs on.

        Raises ConfigError when its GPUs cannot be spread evenly over them.
        """
        per_node = self.config.gpus_per_node
        nodes = hardware.nodes or -(-hardware.gpus // per_node) or 1
        if hardware.gpus % nodes or (hardware.nodes is None and nodes > 1 and hardware.gpus % per_node):
            raise ConfigError(
                f"hardware.gpus: {hardware.gpus} GPUs do not fill whole machines of {per_node} (gpus_per_node of the "
                "configuration); ask for a multiple, or say hardware.nodes"
            )
        return nodes

    def stages(self, recipe: str | None = None) -> list[StagePlan]:
        """The stages of one recipe, or every owned stage of all recipes."""
        if recipe is not None:
            self._known(recipe, self._paths, self.where, "recipe")
            return self._paths[recipe]
        unique = {stage.id: stage for path in self._paths.values() for stage in path}
        return list(unique.values())

    def stage(self, owner: str, name: str) -> StagePlan:
        """The stage ``name`` that recipe ``owner`` declares."""
        found = {stage.name: stage for stage in self.stages(owner)}
        self._known(name, found, f"recipe '{owner}'", "stage")
        if found[name].owner != owner:
            raise ConfigError(
                f"results/{owner}/{name}: recipe '{owner}' shares this stage; it is made at "
                f"{found[name].directory()}"
            )
        return found[name]

    def checkpoint(self, reference: str, where: str = "") -> StagePlan:
        """The stage behind ``recipe`` (its last) or ``recipe@stage``, whatever the variant."""
        base, variant = split(reference, where or self.where)
        recipe, _, stage = base.partition("@")
        self._known(recipe, self._paths, where or self.where, "recipe")
        path = {s.name: s for s in self._paths[recipe]}
        if stage:
            self._known(stage, path, where or self.where, f"stage of '{recipe}'")
        found = path[stage] if stage else self._paths[recipe][-1]
        if variant and not found.sparsified:
            raise ConfigError(
                f"{where or self.where}: '{reference}': the checkpoint has no predictors that could keep more or less; "
                "only what follows a stage 'sparsify' has variants"
            )
        return found

    def family(self, reference: str) -> str:
        """What checkpoints that differ in nothing but their seed have in common: the reference with ``*`` for the value
        of the matrix axis ``seed``, else itself. A stage shared by the seeds is one checkpoint, not many."""
        base, variant = split(reference)
        recipe, at, stage = base.partition("@")
        owned = self.checkpoint(base).owner == recipe
        suffix = variant.suffix if variant else ""
        return f"{self._recipes[recipe].family}{at}{stage}{suffix}" if owned else reference

    @cached_property
    def chosen_recipes(self) -> list[str]:
        """The checkpoints to compare, patterns (``demo-*``, ``demo@*``) expanded, in the order of the configuration;
        sparsified ones also at every rate of ``keep_rates``."""
        last = {recipe: path[-1].name for recipe, path in self._paths.items()}
        full = [f"{recipe}@{stage.name}" for recipe, path in self._paths.items() for stage in path]
        projectors = {
            f"{recipe}@{stage.name}"
            for recipe, path in self._paths.items()
            for stage in path
            if stage.settings.PUBLISHES == "projector"
        }
        chosen: dict[str, None] = {}
        for wanted in self.config.recipes:
            pattern, variant = split(wanted, f"{self.where}: recipes")
            names = full if "@" in pattern else self.recipes
            # a projector that saw captions alone answers no questions: only who names it gets it
            hits = [hit for hit in fnmatch.filter(names, pattern) if hit == pattern or hit not in projectors]
            if not hits:
                hint = did_you_mean(pattern, names)
                raise ConfigError(f"{self.where}: recipes: there is no recipe '{pattern}'{hint}")
            for hit in hits:
                recipe, _, stage = hit.partition("@")
                name = recipe if stage == last[recipe] else hit
                chosen |= dict.fromkeys(self._variants(name, variant))
        return list(chosen)

    def _variants(self, name: str, variant: Variant | None) -> list[str]:
        """The variant of a checkpoint that is asked for; without one, itself and what ``keep_rates`` adds."""
        if variant:
            self.checkpoint(f"{name}{variant.suffix}", f"{self.where}: recipes")
            return [f"{name}{variant.suffix}"]
        rates = self.config.keep_rates if self.checkpoint(name).sparsified else []
        return [name, *(f"{name}{Variant(rate).suffix}" for rate in rates)]

    def spec(self, stage: StagePlan) -> str:
        """Canonical JSON of what determines a stage's checkpoint, hardware left out."""
        content: dict[str, Any] = {
            "stage": stage.kind,
            "version": type(stage.settings).VERSION,
            "settings": stage.settings.spec(),
            "parent": stage.parent.id if stage.parent else None,
            "model": stage.vision_language.model_dump(mode="json", exclude_defaults=True),
        }
        for key, facts in (("layouts", self.layouts(stage)), ("subfolders", self._subfolders(stage))):
            if facts:
                content[key] = facts
        references = {role: self.checkpoint(ref).id for role, ref in _all_references(stage.settings).items()}
        if references:
            content["references"] = references
        return canonical_json(content)

    def inputs(self, stage: StagePlan, out: str = "results") -> dict[str, Path]:
        """The manifests a stage is made from, by role."""
        inputs = {
            role: Path("resources/backbones", name, "manifest.json")
            for role, name in self.backbones_of(stage).items()
        }
        if stage.parent:
            inputs["parent"] = stage.parent.manifest(out)
        if tokens := self.tokens_of(stage):
            inputs["tokens"] = tokens.directory / "manifest.json"
        for role, reference in stage.settings.references().items():
            inputs[role] = self.checkpoint(reference).manifest(out)
        for role, annotation in stage.settings.annotations().items():
            inputs[f"{role}_annotations"] = self.annotation_directory(annotation, out) / "manifest.json"
        return inputs

    @staticmethod
    def backbones_of(stage: StagePlan) -> dict[str, str]:
        """The backbones a stage reads, by role. After a whole checkpoint was brought in, everything is in the parent."""
        model = stage.vision_language
        return {} if model.checkpoint and stage.parent else model.parts()

    def backbone_directory(self, name: str) -> Path:
        """Where the files of a backbone lie."""
        return Path("resources/backbones", name, self.backbones[name].subfolder or "")

    def layouts(self, stage: StagePlan) -> dict[str, str]:
        """The layouts of the backbones a stage reads, by role; the stock one is left out."""
        named = {role: self.backbones[name].layout for role, name in self.backbones_of(stage).items()}
        return {role: layout for role, layout in named.items() if layout != "stock"}

    def _subfolders(self, stage: StagePlan) -> dict[str, str]:
        named = {role: self.backbones[name].subfolder for role, name in self.backbones_of(stage).items()}
        return {role: folder for role, folder in named.items() if folder}

    # --- annotations -----------------------------------------------------------------------------------------------

    def annotation_spec(self, annotation: Annotation) -> str:
        """What determines annotations, the manifests of checkpoint and mixture apart."""
        return canonical_json(
            {
                "checkpoint": self.checkpoint(annotation.checkpoint).id,
                "mixture": annotation.mixture,
                "settings": dict(annotation.settings),
            }
        )

    def annotation_directory(self, annotation: Annotation, out: str = "results") -> Path:
        """Where annotations are published; students that ask for the same share them."""
        key = hashlib.sha256(self.annotation_spec(annotation).encode()).hexdigest()[:12]
        return Path(
            _resources(out), "teacher", self.checkpoint(annotation.checkpoint).id, annotation.mixture, key
        )

    @cached_property
    def annotations(self) -> dict[str, Annotation]:
        """Every annotation some stage asks for, by ``checkpoint/mixture/key``."""
        root = Path("resources/teacher")
        return {
            self.annotation_directory(annotation).relative_to(root).as_posix(): annotation
            for stage in self.stages()
            for annotation in stage.settings.annotations().values()
        }

    # --- data ------------------------------------------------------------------------------------------------------

    def tokens_of(self, stage: StagePlan) -> TokensPlan | None:
        """The tokens a stage trains on."""
        mixture, encoding = stage.settings.mixture(), stage.settings.encoding()
        return self._tokens(mixture, stage, encoding) if mixture and encoding else None

    def annotated_tokens(self, annotation: Annotation) -> TokensPlan:
        """The mixture as the annotating model reads it."""
        encoding = Encoding(annotation.settings["template"], annotation.settings["max_length"])
        return self._tokens(annotation.mixture, self.checkpoint(annotation.checkpoint), encoding)

    def _tokens(self, mixture: str, stage: StagePlan, encoding: Encoding) -> TokensPlan:
        first = stage.path()[0]
        model = first.vision_language
        if model.checkpoint:
            # a whole model tells its tokenizer when it has been brought in
            manifest = first.manifest()
            origin: dict[str, Any] = {"checkpoint": first.id}
            return TokensPlan(
                mixture,
                encoding,
                origin,
                model,
                {"checkpoint": manifest},
                {"checkpoint": manifest.parent},
                {},
            )
        names, layouts = self.backbones_of(first), self.layouts(first)
        origin = {**names, "feature_select": model.feature_select}
        if layouts:
            origin["layouts"] = layouts
        return TokensPlan(
            mixture,
            encoding,
            origin,
            model,
            {role: Path("resources/backbones", name, "manifest.json") for role, name in names.items()},
            {role: self.backbone_directory(name) for role, name in names.items()},
            layouts,
        )

    @cached_property
    def tokens(self) -> dict[str, TokensPlan]:
        """All tokens some stage or annotation needs, by key."""
        wanted = [
            *(self.tokens_of(stage) for stage in self.stages()),
            *map(self.annotated_tokens, self.annotations.values()),
        ]
        return {tokens.key: tokens for tokens in wanted if tokens}

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
        return sorted(
            {f"resources/datasets/{part.dataset}/manifest.json" for part in self.mixtures[name].parts}
        )

    # --- benchmarks ------------------------------------------------------------------------------------------------

    def benchmark_entry(self, name: str, smoke: bool = False) -> BenchmarkEntry:
        """A benchmark's settings; smoke runs ask a few questions only."""
        entry = self.benchmarks[name]
        return entry.model_copy(update={"limit": self.config.smoke.questions}) if smoke else entry

    def benchmark_spec(self, name: str, smoke: bool = False) -> str:
        """What determines a benchmark's questions and references."""
        how = {"chunks", "batch_size", "title", "scored", "judge", "questions"}
        entry = self.benchmark_entry(name, smoke)
        content = entry.model_dump(mode="json", exclude_defaults=True, exclude=how)
        version = get(entry.task).VERSION
        if version > 1:
            content["version"] = version
        if ":" in entry.task:
            content["code"] = sha256(source_file(entry.task))
        return canonical_json(content)

    def benchmark_inputs(self, name: str) -> str:
        """The manifest of the data set a benchmark reads."""
        return f"resources/datasets/{self.benchmarks[name].data}/manifest.json"

    def chunk_files(self, out: str, checkpoint: str, benchmark: str) -> list[str]:
        """The answer chunks of a benchmark."""
        chunks = self.benchmarks[benchmark].chunks
        folder = f"{out}/{checkpoint}/eval/{benchmark}/chunks"
        return [f"{folder}/{index:04d}-of-{chunks:04d}.jsonl" for index in range(chunks)]

    def controls(self, benchmark: str) -> list[str]:
        """Chosen benchmarks that ask the same questions under a control, to be shown beside ``benchmark``."""
        entry = self.benchmarks[benchmark]
        if entry.control:
            return []
        same = {"control": None, "title": "", "chunks": 1, "batch_size": 1, "judge": None, "questions": None}
        return [
            name
            for name in self.chosen_benchmarks
            if self.benchmarks[name].control
            and self.benchmarks[name].model_copy(update=same) == entry.model_copy(update=same)
        ]

    def score_files(self, out: str, benchmark: str) -> list[str]:
        """The scores a comparison reads, those of controls included."""
        return [
            f"{out}/{checkpoint}/eval/{name}/score.json"
            for name in (benchmark, *self.controls(benchmark))
            for checkpoint in self.chosen_recipes
        ]

    def leaderboard_files(self, out: str) -> list[str]:
        """Scores and verdicts of every chosen checkpoint on every compared benchmark."""
        return [
            f"{out}/{checkpoint}/eval/{benchmark}/{file}"
            for benchmark in self.compared_benchmarks
            for checkpoint in self.chosen_recipes
            for file in ("score.json", "per_item.jsonl")
        ]

    def judge_files(self, out: str, checkpoint: str, benchmark: str) -> list[str]:
        """The judge's replies that a score reads, if a judge is asked."""
        return (
            [f"{out}/{checkpoint}/eval/{benchmark}/judge.jsonl"] if self.benchmarks[benchmark].judge else []
        )

    def judge_spec(self, benchmark: str) -> str:
        """Which judge is asked; how patiently does not change its replies."""
        judge = self.benchmarks[benchmark].judge
        return canonical_json(
            judge.model_dump(include={"base_url", "model", "temperature"}) if judge else None
        )

    def published(self, benchmark: str) -> str:
        """The published figures of what ``benchmark`` asks, as canonical JSON."""
        return canonical_json(published_rows(self._published, get(self.benchmarks[benchmark].task).name))

    def prepared_benchmarks(self, smoke: str = "") -> list[str]:
        """Manifests of the chosen benchmarks' questions, controls apart; ``smoke`` is the folder of smoke runs."""
        return [
            f"resources/{smoke}benchmarks/{name}/manifest.json"
            for name in self.chosen_benchmarks
            if not self.benchmarks[name].control
        ]

    @property
    def scored_benchmarks(self) -> list[str]:
        """Chosen benchmarks that can be scored here."""
        return [name for name in self.chosen_benchmarks if self.benchmarks[name].scored]

    @property
    def compared_benchmarks(self) -> list[str]:
        """Chosen benchmarks with a comparison of their own; controls stand in that of another."""
        return [name for name in self.scored_benchmarks if not self.benchmarks[name].control]

    def per_checkpoint(self, file: str, out: str = "results") -> list[str]:
        """One file of every chosen checkpoint and benchmark; only scored ones have more than answers."""
        benchmarks = self.chosen_benchmarks if file == "answers.jsonl" else self.scored_benchmarks
        return [
            f"{out}/{checkpoint}/eval/{benchmark}/{file}"
            for checkpoint in self.chosen_recipes
            for benchmark in benchmarks
        ]

    def submissions(self, out: str = "results") -> list[str]:
        """The submission of every chosen checkpoint, as it was trained, to every chosen benchmark that is no control."""
        return [
            f"{out}/{checkpoint}/submit/{benchmark}.{get(self.benchmarks[benchmark].task).submission}"
            for checkpoint in self.chosen_recipes
            for benchmark in self.chosen_benchmarks
            if not self.benchmarks[benchmark].control and not split(checkpoint)[1]
        ]

    def chosen_stages(self) -> list[StagePlan]:
        """Every stage on the paths of the chosen checkpoints, each once, first ones first."""
        path = [s for reference in self.chosen_recipes for s in self.checkpoint(reference).path()]
        return list({stage.id: stage for stage in path}.values())

    def report_items(self, out: str = "results") -> list[str]:
        """What the report shows beside the comparisons."""
        stages = self.chosen_stages()
        mixtures = sorted({m for stage in stages if (m := stage.settings.mixture())})
        tokens = sorted({t.directory for stage in stages if (t := self.tokens_of(stage))})
        return [
            *(f"{stage.directory(out)}/report/settings.html" for stage in stages),
            *(f"{stage.directory(out)}/report/loss.svg" for stage in stages if stage.settings.mixture()),
            *(f"resources/mixtures/{mixture}/report.html" for mixture in mixtures),
            *(f"{directory}/report.html" for directory in tokens),
            *(f"{out}/overlap/{mixture}.html" for mixture in mixtures),
            *self.per_checkpoint("samples.html", out),
            *(f"{out}/{benchmark}.html" for benchmark in self.compared_benchmarks),
            *(
                [f"{out}/leaderboard.html"]
                if len(self.chosen_recipes) > 1 and self.compared_benchmarks
                else []
            ),
            *self.expert_logs.figures(out),
            *self.savings.report_items(out),
        ]

    def job(self, stage: StagePlan, out: str = "results", **use: Any) -> StageJob:
        """The job that makes a stage; ``use`` gives threads, gpus and log."""
        inputs = self.inputs(stage, out)
        directory = stage.directory(out)
        return StageJob(
            recipe=stage.owner,
            stage=stage.name,
            spec=self.spec(stage),
            model_dir=directory / "model",
            state_dir=directory / "state",
            report_dir=directory / "report",
            vision_language=stage.vision_language,
            backbones={
                role: self.backbone_directory(name) for role, name in self.backbones_of(stage).items()
            },
            layouts=self.layouts(stage),
            parent=inputs["parent"].parent if "parent" in inputs else None,
            references={role: inputs[role].parent for role in stage.settings.references()},
            annotations={role: inputs[f"{role}_annotations"].parent for role in stage.settings.annotations()},
            tokens=inputs["tokens"].parent if "tokens" in inputs else None,
            manifests=tuple(inputs.values()),
            max_steps=self.config.smoke.max_steps if out.endswith("/smoke") else None,
            **use,
        )

    def warnings(self) -> Iterator[str]:
        """Stages that would be trained twice with the same settings on the same ancestors."""
        seen: dict[str, StagePlan] = {}
        for stage in self.stages():
            chain = canonical_json(
                [[s.kind, s.settings.spec(), self.spec(s) if not s.parent else ""] for s in stage.path()]
            )
            other = seen.setdefault(chain, stage)
            if other is not stage:
                yield f"{stage.id} equals {other.id}: let one recipe extend the other to train it once"


@dataclass(frozen=True)
class _Inherited:
    """What a recipe hands on to those that extend it, beside its stages."""

    defaults: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _NamedRecipe:
    settings: Recipe
    where: str
    family: str
    """The name with ``*`` for the seed of its matrix."""


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


def _all_references(stage: Stage) -> dict[str, str]:
    """Every other checkpoint a stage needs, directly or through annotations."""
    return stage.references() | {role: wanted.checkpoint for role, wanted in stage.annotations().items()}


def _resources(out: str) -> str:
    """The folder of made things beside ``results`` or ``results/smoke``."""
    return out.replace("results", "resources", 1)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``, mappings merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _read_recipes(folder: Path) -> dict[str, _NamedRecipe]:
    """Every recipe of ``config/recipes``, matrices expanded."""
    recipes: dict[str, _NamedRecipe] = {}
    for path in sorted(folder.glob("*.yaml")):
        raw = read_mapping(path)
        for name, family, content in _expand_matrix(path, raw):
            if name in recipes:
                raise ConfigError(f"{path}: there is a recipe '{name}' already, from {recipes[name].where}")
            recipes[name] = _NamedRecipe(validate(Recipe, content, str(path)), str(path), family)
    if not recipes:
        raise ConfigError(f"{folder}: no recipe files (*.yaml) found; is this the project directory?")
    return recipes


def _expand_matrix(path: Path, raw: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, family and content of every recipe in a file."""
    content = dict(raw)
    matrix = content.pop("matrix", {})
    pattern = content.pop("name", "-".join([path.stem, *(f"{{{axis}}}" for axis in matrix)]))
    if not isinstance(matrix, dict) or not all(isinstance(v, list) and v for v in matrix.values()):
        raise ConfigError(f"{path}: matrix: expected 'axis: [value, ...]' lines")
    for axis in matrix:
        if len(matrix) and f"{{{axis}}}" not in str(pattern):
            raise ConfigError(f"{path}: name: '{pattern}' lacks '{{{axis}}}'; variants would share one name")
    for values in itertools.product(*matrix.values()):
        chosen = dict(zip(matrix, values, strict=True))
        of_all_seeds = chosen | ({"seed": "*"} if "seed" in matrix else {})
        name, family = (str(_substitute(pattern, axes)) for axes in (chosen, of_all_seeds))
        yield name, family, _substitute(content, chosen)


def _substitute(value: Any, chosen: Mapping[str, Any]) -> Any:
    """Replace ``{axis}`` in every text; a text that is nothing but ``{axis}`` takes the value with its type."""
    if isinstance(value, dict):
        return {_substitute(key, chosen): _substitute(item, chosen) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, chosen) for item in value]
    if isinstance(value, str):
        for axis, replacement in chosen.items():
            if value == f"{{{axis}}}":
                return replacement
            value = value.replace(f"{{{axis}}}", str(replacement))
    return value
