"""Recipes resolved into stages: inherited and owned ones, and their parents."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpipe.errors import ConfigError, did_you_mean
from mmpipe.plan.catalogues import NAME, Catalogues, check_known
from mmpipe.plan.config import Config, Recipe
from mmpipe.plan.stages import StagePlan
from mmpipe.plan.variants import Variant, split
from mmpipe.settings import read_mapping, todays_keys, validate
from mmpipe.stages import stage_kinds
from mmpipe.stages.base import Hardware, Stage, TrainStage, share_batch

CONSTRUCT = "construct"
"""The stage that imports a whole checkpoint; put before the others where a recipe does not name it."""
_RESERVED = {"overlap", "smoke", "eval", "submit", "report", "leaderboard"}


class Recipes:
    """All recipes of ``config/recipes`` below ``root``, each a path of stages.

    ``where`` names the main configuration in messages. Raises ConfigError, naming file and key.
    """

    def __init__(self, root: Path, catalogues: Catalogues, config: Config, where: str) -> None:
        self._catalogues = catalogues
        self._config = config
        self._where = where
        self._recipes = _read_recipes(root / "config/recipes")
        self._paths: dict[str, list[StagePlan]] = {}
        self._merged: dict[str, Recipe] = {}
        """Recipes with the defaults and the hardware of those they extend."""
        for name in self._recipes:
            self._resolve(name, ())
        self._check_names()
        self._check_references()
        self._check_hardware()

    # ---- reading

    def _resolve(self, name: str, below: tuple[str, ...]) -> list[StagePlan]:
        """The stages of recipe ``name``, first to last."""
        if name in self._paths:
            return self._paths[name]
        recipe = self._recipes[name]
        if name in below:
            circle = " -> ".join([*below[below.index(name) :], name])
            raise ConfigError(f"{recipe.where}: 'extends' goes round in a circle: {circle}")
        inherited: list[StagePlan] = []
        merged = recipe.settings
        if recipe.settings.extends:
            parent, _, last = recipe.settings.extends.partition("@")
            check_known(parent, self._recipes, f"{recipe.where}: extends", "recipe")
            inherited = self._resolve(parent, (*below, name))
            if last:
                names = [stage.name for stage in inherited]
                check_known(last, names, f"{recipe.where}: extends", f"stage of '{parent}'")
                inherited = inherited[: names.index(last) + 1]
            above = self._merged[parent]
            common = {key: _merged(getattr(above, key), getattr(merged, key)) for key in ("defaults", "hardware")}
            merged = merged.model_copy(update=common)
        self._merged[name] = merged
        self._paths[name] = self._path(name, recipe, inherited)
        return self._paths[name]

    def _path(self, name: str, recipe: _NamedRecipe, inherited: list[StagePlan]) -> list[StagePlan]:
        """The inherited stages up to the first that changes, then everything this recipe owns."""
        own = recipe.settings.stages
        vision_language = recipe.settings.model or (inherited[-1].vision_language if inherited else None)
        if vision_language is None:
            raise ConfigError(f"{recipe.where}: the key 'model' is missing; name its vision and language backbone")
        for role, backbone in vision_language.parts().items():
            check_known(backbone, self._catalogues.backbones, f"{recipe.where}: model.{role}", "backbone")
        keeps_model = not inherited or vision_language == inherited[0].vision_language
        path = list(itertools.takewhile(lambda stage: keeps_model and stage.name not in own, inherited))
        repeated = {stage.name: stage for stage in inherited[len(path) :]}
        order = [*repeated, *(name for name in own if name not in repeated)]
        if vision_language.checkpoint and not path:
            # a whole model is imported before anything reads it
            order = list(dict.fromkeys([CONSTRUCT, *order]))
        if not path and not order:
            raise ConfigError(f"{recipe.where}: the recipe has no stages")
        for stage_name in order:
            kind, settings = self._stage(name, stage_name, recipe, repeated.get(stage_name))
            stage = StagePlan(
                owner=name,
                name=stage_name,
                kind=kind,
                settings=settings,
                vision_language=vision_language,
                parent=path[-1] if path else None,
                where=recipe.where,
                answering=recipe.settings.answering or (inherited[0].answering if inherited else Hardware()),
            )
            path.append(stage)
        return path

    def _stage(self, owner: str, name: str, recipe: _NamedRecipe, before: StagePlan | None) -> tuple[str, Stage]:
        """Kind and settings of a stage: its own over the recipe's defaults, over those of the repeated stage ``before``."""
        where = f"{recipe.where}: stages.{name}"
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in _RESERVED:
            raise ConfigError(f"{where}: a stage name holds a-z, 0-9 and '_' and is none of {sorted(_RESERVED)}")
        own = dict(recipe.settings.stages.get(name) or {})
        kind = own.pop("kind", before.kind if before else name)
        check_known(kind, stage_kinds(), where, "stage")
        settings_class = stage_kinds()[kind]
        own = todays_keys(settings_class, own, where)
        # a repeated stage carries what the parent's defaults gave it
        base = before.settings.model_dump(exclude_unset=True) if before else {}
        common = recipe.settings if before else self._merged[owner]
        defaults = {key: value for key, value in common.defaults.items() if key in settings_class.model_fields}
        on_gpus = settings_class.ON_GPUS
        shared = {key: value for key, value in common.hardware.items() if on_gpus or key not in ("gpus", "nodes")}
        hardware = _merged(shared, own.get("hardware", {}))
        raw = _merged(_merged(base, defaults), own)
        if hardware:
            raw["hardware"] = _merged(base.get("hardware", {}), hardware)
        settings: Stage = validate(settings_class, raw, where)
        mixture = settings.mixture()
        if mixture is not None:
            check_known(mixture, self._catalogues.mixtures, f"{where}.data", "mixture")
        return kind, settings

    # ---- checks

    def _check_names(self) -> None:
        for name, recipe in self._recipes.items():
            if not NAME.fullmatch(name):
                raise ConfigError(f"{recipe.where}: the recipe name '{name}' may hold a-z, 0-9, '.', '_', '-' only")
            if name in self._catalogues.benchmarks or name in _RESERVED:
                raise ConfigError(
                    f"{recipe.where}: the recipe name '{name}' is taken (a benchmark or a folder of results/); "
                    "rename the recipe"
                )

    def _check_references(self) -> None:
        """References name known checkpoints, none of them a variant, and no stage needs itself."""
        for stage in self.stages():
            for role, reference in stage.references().items():
                where = f"{stage.where}: stages.{stage.name}.{role}"
                if split(reference, where)[1]:
                    raise ConfigError(f"{where}: '{reference}': variants answer benchmarks only")
                if stage.id in {other.id for other in self.needed(self.checkpoint(reference, where))}:
                    raise ConfigError(f"{where} depends on this stage itself")

    def _check_hardware(self) -> None:
        for stage in self.stages():
            hardware, settings = stage.settings.hardware, stage.settings
            try:
                self.nodes(stage.answering)
                nodes = self.nodes(hardware)
                if isinstance(settings, TrainStage):
                    share_batch(settings.batch_size, hardware.gpus or nodes)
            except ConfigError as error:
                raise ConfigError(f"{stage.where}: stages.{stage.name}: {error}") from None

    # ---- questions

    @property
    def names(self) -> list[str]:
        """All recipe names."""
        return list(self._paths)

    def stages(self, recipe: str | None = None) -> list[StagePlan]:
        """The stages of one recipe, or every owned stage of all recipes."""
        if recipe is not None:
            check_known(recipe, self._paths, self._where, "recipe")
            return self._paths[recipe]
        return list({stage.id: stage for path in self._paths.values() for stage in path}.values())

    def stage(self, owner: str, name: str) -> StagePlan:
        """The stage ``name`` that recipe ``owner`` declares."""
        found = {stage.name: stage for stage in self.stages(owner)}
        check_known(name, found, f"recipe '{owner}'", "stage")
        if found[name].owner != owner:
            raise ConfigError(
                f"results/{owner}/{name}: recipe '{owner}' shares this stage; it is made at {found[name].directory()}"
            )
        return found[name]

    def checkpoint(self, reference: str, where: str = "") -> StagePlan:
        """The stage of ``recipe`` (its last) or ``recipe@stage``, for any variant."""
        where = where or self._where
        base, variant = split(reference, where)
        recipe, _, name = base.partition("@")
        check_known(recipe, self._paths, where, "recipe")
        path = {stage.name: stage for stage in self._paths[recipe]}
        if name:
            check_known(name, path, where, f"stage of '{recipe}'")
        found = path[name] if name else self._paths[recipe][-1]
        if variant and not found.sparsified:
            raise ConfigError(
                f"{where}: '{reference}': the checkpoint has no predictors that could keep more or less; "
                "only what follows a stage 'sparsify' has variants"
            )
        return found

    def needed(self, stage: StagePlan) -> list[StagePlan]:
        """Every stage that ``stage``'s checkpoint depends on, itself and those of its teachers included."""
        found: dict[str, StagePlan] = {}
        waiting = [stage]
        while waiting:
            current = waiting.pop()
            if current.id not in found:
                found[current.id] = current
                waiting += map(self.checkpoint, current.references().values())
                waiting += [current.parent] if current.parent else []
        return list(found.values())

    def every_checkpoint(self) -> list[str]:
        """Every reference to a checkpoint, ``recipe`` and ``recipe@stage``, variants apart."""
        return [
            name
            for recipe, path in self._paths.items()
            for name in (recipe, *(f"{recipe}@{stage.name}" for stage in path))
        ]

    def chosen(self) -> list[str]:
        """The checkpoints to compare, patterns (``demo-*``, ``demo@*``) expanded, in the order of the configuration;
        sparsified ones also at every rate of ``keep_rates``."""
        full = {f"{recipe}@{stage.name}": stage for recipe, path in self._paths.items() for stage in path}
        chosen: dict[str, None] = {}
        for wanted in self._config.recipes:
            pattern, variant = split(wanted, f"{self._where}: recipes")
            names = list(full) if "@" in pattern else self.names
            # a projector trained on captions alone answers no questions: a pattern does not include it, its name does
            hits = [
                hit
                for hit in fnmatch.filter(names, pattern)
                if hit == pattern or hit not in full or full[hit].settings.PUBLISHES != "projector"
            ]
            if not hits:
                hint = did_you_mean(pattern, names)
                raise ConfigError(f"{self._where}: recipes: there is no recipe '{pattern}'{hint}")
            for hit in hits:
                recipe, _, stage = hit.partition("@")
                name = recipe if stage == self._paths[recipe][-1].name else hit
                chosen |= dict.fromkeys(self._variants(name, variant))
        return list(chosen)

    def _variants(self, name: str, variant: Variant | None) -> list[str]:
        """The requested variant of a checkpoint; without one, itself and those of ``keep_rates``."""
        if variant:
            self.checkpoint(f"{name}{variant.suffix}", f"{self._where}: recipes")
            return [f"{name}{variant.suffix}"]
        rates = self._config.keep_rates if self.checkpoint(name).sparsified else []
        return [name, *(f"{name}{Variant(rate).suffix}" for rate in rates)]

    def family(self, reference: str) -> str:
        """The common name of checkpoints that differ only in their seed: the reference with ``*`` for the value of the
        matrix axis ``seed``, else itself. A stage shared by the seeds is one checkpoint."""
        base, variant = split(reference)
        recipe, at, stage = base.partition("@")
        owned = self.checkpoint(base).owner == recipe
        suffix = variant.suffix if variant else ""
        return f"{self._recipes[recipe].family}{at}{stage}{suffix}" if owned else reference

    def nodes(self, hardware: Hardware) -> int:
        """The number of machines of the cluster a job runs on.

        Raises ConfigError when its GPUs cannot be spread evenly over them.
        """
        per_node = self._config.gpus_per_node
        nodes = hardware.nodes or -(-hardware.gpus // per_node) or 1
        if hardware.gpus % nodes or (hardware.nodes is None and nodes > 1 and hardware.gpus % per_node):
            raise ConfigError(
                f"hardware.gpus: {hardware.gpus} GPUs do not fill whole machines of {per_node} (gpus_per_node of the "
                "configuration); ask for a multiple, or say hardware.nodes"
            )
        return nodes


@dataclass(frozen=True)
class _NamedRecipe:
    settings: Recipe
    where: str
    family: str
    """The name with ``*`` for the seed of its matrix."""


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` updated by ``over``, mappings merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _read_recipes(folder: Path) -> dict[str, _NamedRecipe]:
    """Every recipe of ``config/recipes``, matrices expanded; defaults and hardware under today's keys, to be merged."""
    recipes: dict[str, _NamedRecipe] = {}
    for path in sorted(folder.glob("*.yaml")):
        for name, family, content in _expand_matrix(path, read_mapping(path)):
            if name in recipes:
                raise ConfigError(f"{path}: there is a recipe '{name}' already, from {recipes[name].where}")
            recipe: Recipe = validate(Recipe, content, str(path))
            todays = {
                "defaults": _todays_defaults(recipe.defaults, path),
                "hardware": todays_keys(Hardware, recipe.hardware, f"{path}: hardware"),
            }
            recipes[name] = _NamedRecipe(recipe.model_copy(update=todays), str(path), family)
    if not recipes:
        raise ConfigError(f"{folder}: no recipe files (*.yaml) found; is this the project directory?")
    return recipes


def _todays_defaults(defaults: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Defaults under today's keys. Raises ConfigError for a key that no stage has."""
    kinds = stage_kinds().values()
    chosen: dict[type[Stage], dict[str, Any]] = {}
    for key, value in defaults.items():
        kind = next((kind for kind in kinds if key in kind.model_fields or key in kind.FORMER_KEYS), None)
        if kind is None:
            every = {name for kind in kinds for name in kind.model_fields}
            raise ConfigError(f"{path}: unknown key 'defaults.{key}'{did_you_mean(key, every)}")
        chosen.setdefault(kind, {})[key] = value
    where = f"{path}: defaults"
    return {key: value for kind, values in chosen.items() for key, value in todays_keys(kind, values, where).items()}


def _expand_matrix(path: Path, raw: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, family and content of every recipe in a file."""
    content = dict(raw)
    matrix = content.pop("matrix", {})
    if not isinstance(matrix, dict) or not all(isinstance(v, list) and v for v in matrix.values()):
        raise ConfigError(f"{path}: matrix: expected 'axis: [value, ...]' lines")
    pattern = content.pop("name", "-".join([path.stem, *(f"{{{axis}}}" for axis in matrix)]))
    for axis in matrix:
        if f"{{{axis}}}" not in str(pattern):
            raise ConfigError(f"{path}: name: '{pattern}' lacks '{{{axis}}}'; variants would share one name")
    for values in itertools.product(*matrix.values()):
        chosen = dict(zip(matrix, values, strict=True))
        of_all_seeds = chosen | ({"seed": "*"} if "seed" in matrix else {})
        name, family = (str(_substitute(pattern, axes)) for axes in (chosen, of_all_seeds))
        yield name, family, _substitute(content, chosen)


def _substitute(value: Any, chosen: Mapping[str, Any]) -> Any:
    """Replace ``{axis}`` in every string; a string that is just ``{axis}`` becomes the value with its type."""
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
