"""Which expert logs and figures a configuration asks for; plain Python, read while Snakemake plans."""

from __future__ import annotations

import fnmatch
import hashlib
from functools import cached_property
from typing import TYPE_CHECKING

from mmpipe.artifacts.files import canonical_json
from mmpipe.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from mmpipe.analysis.base import Family
    from mmpipe.benchmarks.spec import BenchmarkEntry
    from mmpipe.plan.config import LogExperts
    from mmpipe.plan.plan import Plan, StagePlan

WITHOUT_FIRST = "@without_first"
"""What the name of a benchmark ends with that is answered without each token's first expert."""


class ExpertLogs:
    """The part of the plan that ``log_experts`` opens; empty without it.

    Raises ConfigError for patterns that match nothing.
    """

    def __init__(self, plan: Plan) -> None:
        self.settings = plan.config.log_experts
        self._plan = plan
        self.benchmarks: list[str] = []
        self.checkpoints: list[str] = []
        self.variants: dict[str, BenchmarkEntry] = {}
        if self.settings is None:
            return
        asked = [name for name in plan.chosen_benchmarks if not plan.benchmarks[name].control]
        self.benchmarks = self._chosen("benchmarks", self.settings.benchmarks, asked)
        self.checkpoints = self._logged_checkpoints(self.settings)
        if self.settings.without_first:
            self.variants = {
                name + WITHOUT_FIRST: plan.benchmarks[name].model_copy(update={"control": "without_first_expert"})
                for name in self.benchmarks
                if plan.benchmarks[name].scored
            }

    def _logged_checkpoints(self, settings: LogExperts) -> list[str]:
        chosen = self._plan.chosen_recipes
        if settings.checkpoints is not None:
            return self._chosen("checkpoints", settings.checkpoints, chosen)
        sparse = [name for name in chosen if self._plan.checkpoint(name).sparse]
        if not sparse:
            raise ConfigError(
                f"{self._plan.where}: log_experts: none of the chosen recipes grows experts; choose a sparse one under "
                "'recipes', or name the checkpoints of a sparse backbone under 'log_experts: {checkpoints: [...]}'"
            )
        return sparse

    def _chosen(self, key: str, patterns: list[str], names: list[str]) -> list[str]:
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                hint = did_you_mean(pattern, names)
                raise ConfigError(f"{self._plan.where}: log_experts: {key}: '{pattern}' is not chosen{hint}")
        return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]

    def spec(self) -> str:
        """What determines a log, checkpoint and questions apart."""
        return canonical_json({"layers": self.settings.layers if self.settings else None})

    def probe_spec(self) -> str:
        """What determines the figures that run the model."""
        return canonical_json({"questions": self.settings.similarity_questions if self.settings else None})

    def chunk_files(self, out: str, checkpoint: str, benchmark: str) -> list[str]:
        """The logs of the chunks of a benchmark."""
        chunks = self._plan.chunk_files(out, checkpoint, benchmark)
        return [path.removesuffix(".jsonl") + self.chunk_ending for path in chunks]

    @property
    def chunk_ending(self) -> str:
        """What the name of a chunk's log ends with: another one for other layers."""
        return f".experts-{hashlib.sha256(self.spec().encode()).hexdigest()[:8]}.parquet"

    def path(self, out: str, checkpoint: str, benchmark: str) -> str:
        """The log of a checkpoint on a benchmark."""
        return f"{out}/{checkpoint}/eval/{benchmark}/experts.parquet"

    def series(self, checkpoint: str) -> list[str]:
        """The logged checkpoints on the way to ``checkpoint``, itself the last: what training did to routing."""
        place = {stage.id: n for n, stage in enumerate(self._plan.checkpoint(checkpoint).path())}
        on_the_way = {name: place.get(self._plan.checkpoint(name).id) for name in self.checkpoints}
        return sorted((name for name, at in on_the_way.items() if at is not None), key=lambda n: on_the_way[n] or 0)

    def sparse_path(self, checkpoint: str) -> list[StagePlan]:
        """The stages on the way to ``checkpoint`` whose checkpoints have experts."""
        return [stage for stage in self._plan.checkpoint(checkpoint).path() if stage.sparse]

    def checkpoint_and_questions(self, out: str, checkpoint: str, benchmark: str) -> list[str]:
        """The manifests of a checkpoint and of the questions it is asked."""
        questions = f"{out.replace('results', 'resources', 1)}/benchmarks/{benchmark}/manifest.json"
        return [str(self._plan.checkpoint(checkpoint).manifest(out)), questions]

    # ---- figures

    @cached_property
    def families(self) -> dict[str, Family]:
        """Every family of metrics; none where nothing is logged."""
        if self.settings is None:
            return {}
        from mmpipe.analysis.base import families

        return families()

    def named(self, per: str, runs_model: bool) -> list[str]:
        """The families that one rule draws."""
        return [name for name, family in self.families.items() if (family.per, family.runs_model) == (per, runs_model)]

    def inputs(self, family: str, out: str, checkpoint: str, benchmark: str = "") -> list[str]:
        """The files a figure is drawn from."""
        return self.families[family].inputs(self, out, checkpoint, benchmark)

    def figures(self, out: str = "results") -> list[str]:
        """Every figure of the analysis."""
        return [
            path.format(family=name)
            for name, family in self.families.items()
            for checkpoint in self.checkpoints
            for path in (
                [f"{out}/{checkpoint}/eval/{benchmark}/experts/{{family}}.svg" for benchmark in self.benchmarks]
                if family.per == "benchmark"
                else [f"{out}/{checkpoint}/experts/{{family}}.svg"]
            )
            if family.applies(self, checkpoint)
        ]
