"""Stages and tokens as planned: settings, parents, places."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import canonical_json
from mmpipe.models.settings import VisionLanguage
from mmpipe.stages.base import Encoding, Hardware, Stage


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
    """What the tokenizer and the number of an image's tokens come from."""
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
        return f"{self.mixture}/{hashlib.sha256(self.spec().encode()).hexdigest()[:12]}"

    @property
    def directory(self) -> Path:
        """Where the tokens are."""
        return Path("resources/tokens", self.key)

    def inputs(self) -> dict[str, Path]:
        """The manifests the tokens are made from, by role."""
        return {"mixture": Path("resources/mixtures", self.mixture, "manifest.json"), **self.manifests}
