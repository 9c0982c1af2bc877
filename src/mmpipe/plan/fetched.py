"""Checks of recipes against the files of their backbones, as soon as these are fetched: no job has to find it out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import translate
from functools import cache
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import read_json
from mmpipe.errors import ConfigError, did_you_mean
from mmpipe.plan.catalogues import Catalogues
from mmpipe.plan.stages import StagePlan
from mmpipe.stages.base import TrainStage

_PROJECTOR = [f"multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]
_NOT_IN_BACKBONES = re.compile(r"lora|expert|router|gate\b|sparsifier|predictor|adapter")
"""Parameters that stages add; patterns that name them are not checked."""
_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of safetensors itself."""


def check_patterns(stages: Iterable[StagePlan], catalogues: Catalogues) -> None:
    """Raise ConfigError for a pattern of ``trainable``, ``learning_rates`` or ``lora.beside`` that matches no parameter
    of the stage's backbones. Backbones that are not fetched, or not in transformers' layout, are not checked."""
    for stage in stages:
        names = _parameters(stage, catalogues)
        settings = stage.settings
        if names is None or not isinstance(settings, TrainStage):
            continue
        patterns = {"learning_rates": tuple(settings.learning_rates)}
        patterns |= {"lora.beside": settings.lora.beside} if settings.lora else {"trainable": settings.trainable}
        for key, given in patterns.items():
            for pattern in given:
                if not _NOT_IN_BACKBONES.search(pattern) and not _matches(pattern, names):
                    raise ConfigError(
                        f"{stage.where}: stages.{stage.name}.{key}: the pattern '{pattern}' matches no parameter of "
                        f"{' and '.join(stage.vision_language.parts().values())}{did_you_mean(pattern, names)}"
                    )


def position_warnings(stages: Iterable[StagePlan], catalogues: Catalogues) -> Iterator[str]:
    """Stages with a ``max_length`` beyond the positions of their language model."""
    for stage in stages:
        parts, settings = stage.vision_language.parts(), stage.settings
        if not isinstance(settings, TrainStage) or not ({"language", "checkpoint"} & parts.keys()):
            continue
        config = _read(
            catalogues.backbone_directory(parts.get("checkpoint") or parts["language"]).absolute() / "config.json"
        )
        text: Mapping[str, Any] = config.get("text_config", config)
        limit = text.get("max_position_embeddings")
        scaled = text.get("rope_scaling") or (text.get("rope_parameters") or {}).get("factor")
        if limit and not scaled and settings.max_length > limit:
            yield (
                f"{stage.id}: max_length is {settings.max_length}, but the language model has {limit} positions "
                f"(max_position_embeddings): longer texts are dropped, not cut; set max_length to {limit}"
            )


def _parameters(stage: StagePlan, catalogues: Catalogues) -> tuple[str, ...] | None:
    """Names of a model's parameters, as ``trainable`` writes them; None where they cannot be told from the files."""
    parts = stage.vision_language.parts()
    if "checkpoint" in parts or catalogues.layouts(parts):
        return None
    language, vision = (
        _tensors(catalogues.backbone_directory(parts[role]).absolute()) for role in ("language", "vision")
    )
    if not vision or not language or not all(name.startswith(("model.", "lm_head.")) for name in language):
        return None
    of_language = [re.sub(r"^model\.", "language_model.", name) for name in language]
    of_vision = [f"vision_tower.{name.removeprefix('vision_model.')}" for name in vision]
    return (*of_language, *of_vision, *_PROJECTOR, "lm_head.weight")


@cache
def _matches(pattern: str, names: tuple[str, ...]) -> bool:
    regex = re.compile(translate(pattern))
    return any(regex.match(name) for name in names)


@cache
def _tensors(directory: Path) -> tuple[str, ...]:
    """The tensors of a backbone by the headers of its safetensors files; none where it has none."""
    index = _read(directory / "model.safetensors.index.json")
    if index:
        return tuple(index["weight_map"])
    try:
        with (directory / "model.safetensors").open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER)))
    except (OSError, ValueError):  # what reads the weights says so
        return ()
    return tuple(name for name in header if name != "__metadata__")


@cache
def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = read_json(path)
    except (OSError, ValueError):  # what reads the model says so
        return {}
    return content
