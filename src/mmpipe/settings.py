"""The base of every typed setting; YAML read into it, with errors that name file, key and the nearest right name."""

from __future__ import annotations

import functools
import types
import typing
import warnings
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from mmpipe.errors import ConfigError, did_you_mean

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
T = TypeVar("T")


class Settings(BaseModel):
    """A group of settings as written in YAML: unknown keys are errors, values do not change after loading.

    Numbers written as YAML 1.1 strings (``2e-5``) are read as numbers.
    """

    # pydantic's use_attribute_docstrings reads sources at every import; mmpipe.plan.schema reads them for the schema
    model_config = ConfigDict(extra="forbid", frozen=True)

    FORMER_KEYS: ClassVar[Mapping[str, str]] = {}
    """Keys of the previous release and their current names. They are read with a warning; the spec of a result
    (:meth:`identity`) keeps them, so that renames do not make results stale."""

    FORMER_KEYS_OF: ClassVar[Mapping[str, type[BaseModel]]] = {}
    """Fields that hold free mappings, and the settings whose former keys these may have."""

    @model_validator(mode="before")
    @classmethod
    def _read_former_keys(cls, value: Any, info: ValidationInfo) -> Any:
        return renamed_keys(cls, value, (info.context or {}).get("where", "")) if isinstance(value, dict) else value

    @model_serializer(mode="wrap")
    def _with_former_keys(self, serialise: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        content: dict[str, Any] = serialise(self)
        if not (info.context or {}).get("identity"):
            return content
        former = {new: old for old, new in self.FORMER_KEYS.items()}
        return {former.get(key, key): value for key, value in content.items()}

    def identity(self, exclude: set[str] | None = None) -> dict[str, Any]:
        """The settings that differ from their defaults, as plain JSON, under the keys they had when they were introduced."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude=exclude, context={"identity": True})


def todays_keys(kind: type[BaseModel], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings as written, with the keys of the previous release renamed, those of nested settings too.

    Settings that are merged before they are validated must go through here first; ``where`` opens the warnings.
    Raises ConfigError when a setting is given under both names, and for anything but a mapping.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected 'name: value' lines, found a {type(values).__name__}")
    try:
        renamed = renamed_keys(kind, values, where)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    for name, value in renamed.items():
        inner = _models_at(kind.model_fields[name].annotation, []) if name in kind.model_fields else []
        if free := getattr(kind, "FORMER_KEYS_OF", {}).get(name):
            inner = [free]
        if isinstance(value, dict) and len(inner) == 1:
            renamed[name] = todays_keys(inner[0], value, f"{where}: {name}")
    return renamed


def renamed_keys(kind: type[BaseModel], values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """As :func:`todays_keys`, of this level alone, for validators: raises ValueError."""
    former = getattr(kind, "FORMER_KEYS", {})
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        name = former.get(key, key)
        if name != key:
            if name in values:
                raise ValueError(f"'{key}' and '{name}' are one setting; leave out '{key}', its former name")
            warnings.warn(
                f"{where}: the key '{key}' is now called '{name}'".removeprefix(": "), FutureWarning, stacklevel=2
            )
        renamed[name] = value
    return renamed


class _UniqueKeyLoader(_Loader):
    """YAML lets a later key silently win over an earlier one; a recipe with two ``finetune:`` is a mistake."""


def _mapping_without_duplicates(loader: Any, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(
                None, None, f"a key is a {type(key).__name__}, not a text", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{key}' stands twice in one mapping", key_node.start_mark
            )
        seen.add(key)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


_DEPTH = 100
_NODES = 1_000_000


def _require_bounded(text: str) -> None:
    """Raise YAMLError for a text nested so deeply, or so large with its aliases written out, that a reader would fail on
    it in other ways: libyaml's ends the process."""
    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    event: Any
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
        if len(open_nodes) > _DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {_DEPTH} deep", problem_mark=event.start_mark)
        if total > _NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {_NODES} values", problem_mark=event.start_mark)


def read_yaml(path: Path) -> Any:
    """Parse a YAML file.

    Raises ConfigError when the file is missing, unreadable, not YAML, or holds a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    try:
        _require_bounded(text)
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: not valid YAML: {problem}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # an impossible date, `!!bool maybe`
        raise ConfigError(f"{path}: not valid YAML: a value cannot be read ({error})") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Parse a YAML file that must hold a mapping (an empty file is an empty mapping)."""
    content = read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected 'name: value' lines, found a {type(content).__name__}")
    for key in content:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: the key {key!r} is not a text; put it in quotes")
    return content


_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)
"""Building one takes longer than most validations."""


def validate(kind: type[T] | Any, value: Any, where: str) -> T:
    """Check ``value`` against a pydantic model or type; ``where`` opens every message.

    Raises ConfigError listing every finding, one a line.
    """
    try:
        checked: T = _adapter(kind).validate_python(value, context={"where": where})
        return checked
    except ValidationError as error:
        lines = [_describe(kind, problem) for problem in findings(error, value)]
        raise ConfigError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines))) from error


def findings(error: ValidationError, value: Any) -> list[dict[str, Any]]:
    """pydantic's findings about ``value``, one a place: of the alternatives of a union, the one that was meant (the
    finding lies inside it), or else all of them in one message. Locations are those of the value, without the names of
    alternatives."""
    by_place: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for problem in error.errors():
        inside, steps = value, list(problem["loc"])
        path: list[Any] = []
        union: tuple[Any, ...] | None = None
        for step in steps:
            known = isinstance(inside, Mapping) and step in inside
            known = known or (isinstance(inside, list | tuple) and isinstance(step, int) and step < len(inside))
            if known:
                inside = inside[step]
            elif step is not steps[-1] or problem["type"] not in ("missing", "extra_forbidden"):
                union = tuple(path) if union is None else union
                continue
            path.append(step)
        found = {**problem, "loc": tuple(path)}
        by_place.setdefault(tuple(path) if union is None else union, []).append(found)
    return [one for place, found in by_place.items() for one in _meant(place, found)]


def _meant(place: tuple[Any, ...], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What to say of the findings of one place: those further inside it, or all in one."""
    inside = [one for one in found if len(one["loc"]) > len(place)]
    if inside or len(found) == 1:
        return inside or found
    messages = list(dict.fromkeys(one["msg"] for one in found))
    head = "Input should be "
    if all(message.startswith(head) for message in messages):
        messages = [head + " or ".join(message.removeprefix(head) for message in messages)]
    return [{**found[0], "type": "union", "msg": ", or ".join(messages)}]


def _describe(kind: Any, problem: Mapping[str, Any]) -> str:
    location = list(problem["loc"])
    key = ".".join(str(part) for part in location)
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key '{key}'" + did_you_mean(str(location[-1]), _known_keys(kind, location[:-1]))
        case "missing":
            return f"the key '{key}' is missing"
        case "literal_error" | "enum" if isinstance(problem["input"], str):
            choices = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            return f"{key}: unknown value '{problem['input']}'" + did_you_mean(problem["input"], choices)
        case "union_tag_invalid":
            tags = [tag.strip(" '") for tag in problem["ctx"]["expected_tags"].split(",")]
            return f"{key}: unknown {problem['ctx']['discriminator'].strip(chr(39))} '{problem['ctx']['tag']}'" + (
                did_you_mean(str(problem["ctx"]["tag"]), tags)
            )
        case _:
            value = problem["input"]
            shown = "" if isinstance(value, (dict, BaseModel)) else f" (found {value!r})"
            message = problem["msg"].removeprefix("Value error, ")
            return f"{key}: {message}{shown}" if key else f"{message}{shown}"


def _known_keys(kind: Any, location: list[Any]) -> list[str]:
    """The field names of the model found by walking ``location`` from the type ``kind``."""
    models = _models_at(kind, location)
    return sorted({name for model in models for name in model.model_fields})


def _models_at(kind: Any, location: list[Any]) -> list[type[BaseModel]]:
    origin = typing.get_origin(kind)
    if origin is typing.Annotated or origin in (typing.Union, types.UnionType):
        inner = typing.get_args(kind)[:1] if origin is typing.Annotated else typing.get_args(kind)
        return [model for option in inner for model in _models_at(option, location)]
    if origin in (list, tuple, dict, Mapping):
        return _models_at(typing.get_args(kind)[-1], location[1:]) if location else []
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return []
    if not location:
        return [kind]
    field = kind.model_fields.get(str(location[0]))
    if field is None:  # pydantic puts the tag of a discriminated union into the location
        tags = [f.default for f in kind.model_fields.values()]
        return _models_at(kind, location[1:]) if location[0] in tags else []
    return _models_at(field.annotation, location[1:])
