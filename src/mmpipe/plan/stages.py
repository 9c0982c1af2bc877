"""A planned stage of a recipe: settings, parent, paths."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mmpipe.models.settings import VisionLanguage
from mmpipe.stages.base import Hardware, Stage


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
    """The hardware for answering benchmarks with this checkpoint."""

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

    def path(self) -> list[StagePlan]:
        """This stage and all before it, first one first."""
        return [*(self.parent.path() if self.parent else []), self]

    def backbones(self) -> dict[str, str]:
        """The backbones this stage reads, by role; none after ``construct``, whose checkpoint contains them."""
        model = self.vision_language
        return {} if model.checkpoint and self.parent else model.parts()

    def references(self) -> dict[str, str]:
        """Every other checkpoint this stage needs by role, directly or through precomputed log-probabilities."""
        wanted = self.settings.precomputations()
        return self.settings.references() | {role: request.checkpoint for role, request in wanted.items()}

    @property
    def sparsified(self) -> bool:
        """Whether the checkpoint has token predictors."""
        return any(stage.settings.SPARSIFIES for stage in self.path())

    @property
    def sparse(self) -> bool:
        """Whether the checkpoint has experts."""
        return any(stage.settings.adds_experts() for stage in self.path())
