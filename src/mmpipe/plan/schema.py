"""The JSON schema of the configuration files, generated from their models."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from mmpipe.benchmarks.published import PublishedTable
from mmpipe.benchmarks.spec import BenchmarkEntry
from mmpipe.data.spec import MixtureSpec
from mmpipe.plan.config import Config, Recipe
from mmpipe.sources import source_type
from mmpipe.stages import stage_kinds


def configuration_schema() -> dict[str, Any]:
    """One schema document; ``$defs`` holds ``Config``, ``Recipe``, and the models of catalogue entries and stages.

    ``properties`` maps each configuration file to its model: editors take ``#/properties/config.yaml`` and the like.
    """
    files: dict[str, Any] = {
        "config.yaml": Config,
        "recipes/*.yaml": Recipe,
        "backbones.yaml": dict[str, source_type()],  # type: ignore[misc]
        "datasets.yaml": dict[str, source_type()],  # type: ignore[misc]
        "mixtures.yaml": dict[str, MixtureSpec],
        "benchmarks.yaml": dict[str, BenchmarkEntry],
        "published.yaml": dict[str, PublishedTable],
    }
    adapters = [(name, "validation", TypeAdapter(kind)) for name, kind in files.items()]
    references, definitions = TypeAdapter.json_schemas(adapters)  # type: ignore[arg-type]
    stages = models_json_schema([(kind, "validation") for kind in stage_kinds().values()])[1]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mmpipe configuration",
        "properties": {name: references[(name, "validation")] for name in files},
        "$defs": {**stages["$defs"], **definitions["$defs"]},
    }
