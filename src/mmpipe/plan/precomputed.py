"""Log-probabilities of teachers and references that stages need computed beforehand."""

from __future__ import annotations

from pathlib import Path

from mmpipe.artifacts.files import canonical_json
from mmpipe.plan.benchmarks import chunk_files
from mmpipe.plan.catalogues import Catalogues
from mmpipe.plan.recipes import Recipes
from mmpipe.plan.tokens import TokensPlan, short_hash, tokens_of
from mmpipe.stages.base import Annotation, Encoding


class Precomputations:
    """Every precomputation some stage asks for; students that ask for the same share it."""

    def __init__(self, recipes: Recipes, catalogues: Catalogues) -> None:
        self._recipes = recipes
        self._catalogues = catalogues

    def all(self) -> dict[str, Annotation]:
        """All of them, by ``checkpoint/mixture/key``."""
        return {
            self.directory(request).relative_to("resources/teacher").as_posix(): request
            for stage in self._recipes.stages()
            for request in stage.settings.annotations().values()
        }

    def spec(self, request: Annotation) -> str:
        """What determines the log-probabilities, the manifests of checkpoint and mixture apart."""
        return canonical_json(
            {
                "version": request.VERSION,
                "checkpoint": self._recipes.checkpoint(request.checkpoint).id,
                "mixture": request.mixture,
                "settings": dict(request.settings),
            }
        )

    def directory(self, request: Annotation, out: str = "results") -> Path:
        """Where they are published."""
        resources = out.replace("results", "resources", 1)
        checkpoint = self._recipes.checkpoint(request.checkpoint).id
        return Path(resources, "teacher", checkpoint, request.mixture, short_hash(self.spec(request), 12))

    def chunks(self, request: Annotation, out: str = "results") -> list[str]:
        """The reports of the jobs that share the work."""
        directory = self.directory(request, out)
        jobs = self._recipes.checkpoint(request.checkpoint).answering.chunks
        return chunk_files(f"{directory.parent}/chunks/{directory.name}", jobs, ".json")

    def tokens(self, request: Annotation) -> TokensPlan:
        """The mixture as the teacher reads it."""
        encoding = Encoding(request.settings["template"], request.settings["max_length"])
        return tokens_of(self._catalogues, request.mixture, self._recipes.checkpoint(request.checkpoint), encoding)
