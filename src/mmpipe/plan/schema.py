"""The JSON schema of the configuration files, generated from their models."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from pydantic_core.core_schema import ModelSchema

from mmpipe.benchmarks.published import PublishedTable
from mmpipe.benchmarks.spec import BenchmarkEntry
from mmpipe.data.spec import MixtureSpec
from mmpipe.plan.config import Config, Recipe
from mmpipe.sources import source_type
from mmpipe.stages import stage_kinds


class _WithDocstrings(GenerateJsonSchema):
    """Docstrings of attributes as descriptions (pydantic's ``use_attribute_docstrings`` reads them at every import)."""

    def model_schema(self, schema: ModelSchema) -> dict[str, Any]:
        content = super().model_schema(schema)
        for owner in schema["cls"].__mro__:
            for name, text in _attribute_docstrings(owner):
                if name in content.get("properties", {}):
                    content["properties"][name].setdefault("description", text)
        return content


def _attribute_docstrings(kind: type) -> list[tuple[str, str]]:
    if not kind.__module__.startswith("mmpipe."):
        return []
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return [
        (field.target.id, inspect.cleandoc(text.value.value))
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    ]


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
    references, definitions = TypeAdapter.json_schemas(adapters, schema_generator=_WithDocstrings)  # type: ignore[arg-type]
    kinds = [(kind, "validation") for kind in stage_kinds().values()]
    stages = models_json_schema(kinds, schema_generator=_WithDocstrings)[1]  # type: ignore[arg-type]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mmpipe configuration",
        "properties": {name: references[(name, "validation")] for name in files},
        "$defs": {**stages["$defs"], **definitions["$defs"]},
    }
