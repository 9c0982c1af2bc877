"""Inputs of stages besides checkpoints: tokenised mixtures and precomputed log-probabilities."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import canonical_json
from mmpipe.models.settings import VisionLanguage
from mmpipe.plan.catalogues import Catalogues
from mmpipe.plan.recipes import Recipes
from mmpipe.plan.stages import StagePlan
from mmpipe.stages.base import Encoding, Precomputation


@dataclass(frozen=True)
class TokensPlan:
    """A mixture tokenised for one model, shared by all stages with the same tokenisation."""

    mixture: str
    encoding: Encoding
    model: Mapping[str, Any]
    """What determines the tokenizer and the number of an image's tokens."""
    vision_language: VisionLanguage
    manifests: Mapping[str, Path]
    directories: Mapping[str, Path]
    """A published ``checkpoint``, or the ``vision`` and ``language`` backbones."""
    layouts: Mapping[str, str]

    def spec(self) -> str:
        """What determines the tokens, the inputs' manifests apart."""
        return canonical_json(
            {
                "version": self.encoding.VERSION,
                "mixture": self.mixture,
                "model": dict(self.model),
                "template": self.encoding.template,
                "max_length": self.encoding.max_length,
            }
        )

    @property
    def key(self) -> str:
        """``mixture/hash``."""
        return f"{self.mixture}/{short_hash(self.spec(), 12)}"

    @property
    def directory(self) -> Path:
        """The directory of the tokens."""
        return Path("resources/tokens", self.key)

    def inputs(self) -> dict[str, Path]:
        """The manifests the tokens are made from, by role."""
        return {"mixture": Path("resources/mixtures", self.mixture, "manifest.json"), **self.manifests}


def tokens_of(catalogues: Catalogues, mixture: str, stage: StagePlan, encoding: Encoding) -> TokensPlan:
    """``mixture`` as the model of ``stage`` reads it. An imported whole checkpoint has a tokenizer of its own."""
    first = stage.path()[0]
    model = first.vision_language
    if model.checkpoint:
        manifest = first.manifest()
        inputs, directories = {"checkpoint": manifest}, {"checkpoint": manifest.parent}
        return TokensPlan(mixture, encoding, {"checkpoint": first.id}, model, inputs, directories, {})
    names = first.backbones()
    layouts = catalogues.layouts(names)
    return TokensPlan(
        mixture,
        encoding,
        {**names, "feature_select": model.feature_select} | ({"layouts": layouts} if layouts else {}),
        model,
        {role: backbone_manifest(name) for role, name in names.items()},
        {role: catalogues.backbone_directory(name) for role, name in names.items()},
        layouts,
    )


def backbone_manifest(name: str) -> Path:
    """The manifest of a fetched backbone."""
    return Path("resources/backbones", name, "manifest.json")


def short_hash(text: str, digits: int) -> str:
    """The first hexadecimal ``digits`` of the SHA-256 of ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def chunk_files(folder: str, chunks: int, ending: str) -> list[str]:
    """The output files of the jobs that share some work."""
    return [f"{folder}/{index:04d}-of-{chunks:04d}{ending}" for index in range(chunks)]


class Precomputations:
    """Every precomputation that a stage requests; equal requests share one."""

    def __init__(self, recipes: Recipes, catalogues: Catalogues) -> None:
        self._recipes = recipes
        self._catalogues = catalogues

    def all(self) -> dict[str, Precomputation]:
        """All precomputations, by ``checkpoint/mixture/key``."""
        return {
            self.directory(request).relative_to("resources/teacher").as_posix(): request
            for stage in self._recipes.stages()
            for request in stage.settings.precomputations().values()
        }

    def spec(self, request: Precomputation) -> str:
        """What determines the log-probabilities, the manifests of checkpoint and mixture apart."""
        return canonical_json(
            {
                "version": request.VERSION,
                "checkpoint": self._recipes.checkpoint(request.checkpoint).id,
                "mixture": request.mixture,
                "settings": dict(request.settings),
            }
        )

    def directory(self, request: Precomputation, out: str = "results") -> Path:
        """The directory of the published log-probabilities."""
        resources = out.replace("results", "resources", 1)
        checkpoint = self._recipes.checkpoint(request.checkpoint).id
        return Path(resources, "teacher", checkpoint, request.mixture, short_hash(self.spec(request), 12))

    def chunks(self, request: Precomputation, out: str = "results") -> list[str]:
        """The reports of the jobs that share the work."""
        directory = self.directory(request, out)
        jobs = self._recipes.checkpoint(request.checkpoint).answering.chunks
        return chunk_files(f"{directory.parent}/chunks/{directory.name}", jobs, ".json")

    def tokens(self, request: Precomputation) -> TokensPlan:
        """The mixture as the teacher reads it."""
        encoding = Encoding(request.settings["template"], request.settings["max_length"])
        return tokens_of(self._catalogues, request.mixture, self._recipes.checkpoint(request.checkpoint), encoding)
