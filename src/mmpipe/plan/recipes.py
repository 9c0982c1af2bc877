"""Recipes resolved into stages: what each inherits, owns, and starts from."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpipe.errors import ConfigError, did_you_mean
from mmpipe.plan.catalogues import NAME, Catalogues
from mmpipe.plan.config import Recipe
from mmpipe.plan.stages import StagePlan
from mmpipe.plan.variants import split
from mmpipe.settings import read_mapping, validate
from mmpipe.stages import stage_kinds
from mmpipe.stages.base import Hardware, Stage

CONSTRUCT = "construct"
"""The stage that brings a whole checkpoint in; put before the others where a recipe does not name it."""
_RESERVED = {"overlap", "smoke", "eval", "submit", "report", "leaderboard"}


class Recipes(Catalogues):
    """All recipes, each a path of stages."""

    def __init__(self, config: Mapping[str, Any], root: Path = Path(), where: str = "config") -> None:
        super().__init__(config, root, where)
        self._recipes = _read_recipes(root / "config/recipes")
        self._paths: dict[str, list[StagePlan]] = {}
        self._inherited: dict[str, _Inherited] = {}
        for name in self._recipes:
            self._resolve(name, ())
        self._check_names()
        self._check_references()
        self._check_nodes()

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
            _merged(common.defaults, recipe.settings.defaults), _merged(common.hardware, recipe.settings.hardware)
        )
        self._paths[name] = self._path(name, recipe, inherited)
        return self._paths[name]

    def _path(self, name: str, recipe: _NamedRecipe, inherited: list[StagePlan]) -> list[StagePlan]:
        """The inherited stages up to the first that changes, then everything this recipe owns."""
        own = recipe.settings.stages
        vision_language = recipe.settings.model or (inherited[-1].vision_language if inherited else None)
        if vision_language is None:
            raise ConfigError(f"{recipe.where}: the key 'model' is missing; name its vision and language backbone")
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
                    answering=recipe.settings.answering or (inherited[0].answering if inherited else Hardware()),
                ),
            ]
        return path

    def _stage(
        self, owner: str, name: str, recipe: _NamedRecipe, base: dict[str, Any], before: StagePlan | None
    ) -> tuple[str, Stage]:
        where = f"{recipe.where}: stages.{name}"
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in _RESERVED:
            raise ConfigError(f"{where}: a stage name holds a-z, 0-9 and '_' and is none of {sorted(_RESERVED)}")
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
            if not NAME.fullmatch(name):
                raise ConfigError(f"{recipe.where}: the recipe name '{name}' may hold a-z, 0-9, '.', '_', '-' only")
            if name in self.benchmarks or name in _RESERVED:
                raise ConfigError(
                    f"{recipe.where}: the recipe name '{name}' is taken (a benchmark or a folder of results/); "
                    "rename the recipe"
                )

    def _check_references(self) -> None:
        for stage in self.stages():
            for role, reference in all_references(stage.settings).items():
                if split(reference, f"{stage.where}: stages.{stage.name}.{role}")[1]:
                    raise ConfigError(
                        f"{stage.where}: stages.{stage.name}.{role}: '{reference}': variants answer benchmarks only"
                    )
                other = self.checkpoint(reference, f"{stage.where}: stages.{stage.name}.{role}")
                self._check_no_circle(stage, other, role)

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
            needed = [self.checkpoint(name, "") for name in all_references(current.settings).values()]
            waiting += [*needed, *([current.parent] if current.parent else [])]

    def _check_nodes(self) -> None:
        for stage in self.stages():
            for hardware in (stage.settings.hardware, stage.answering):
                try:
                    self.nodes(hardware)
                except ConfigError as error:
                    raise ConfigError(f"{stage.where}: stages.{stage.name}: {error}") from None

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
                f"results/{owner}/{name}: recipe '{owner}' shares this stage; it is made at {found[name].directory()}"
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


def all_references(stage: Stage) -> dict[str, str]:
    """Every other checkpoint a stage needs, directly or through annotations."""
    return stage.references() | {role: wanted.checkpoint for role, wanted in stage.annotations().items()}
