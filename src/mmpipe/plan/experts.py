"""The expert logs and figures that ``log_experts`` of a configuration asks for."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from functools import cached_property

from mmpipe.analysis.base import MetricFamily, families
from mmpipe.artifacts.files import canonical_json
from mmpipe.benchmarks.spec import BenchmarkEntry
from mmpipe.errors import ConfigError, did_you_mean
from mmpipe.plan.config import LogExperts
from mmpipe.plan.inputs import chunk_files, short_hash
from mmpipe.plan.recipes import Recipes

WITHOUT_FIRST = "@without_first"
"""The ending of a benchmark's name that is answered without each token's first expert."""


class ExpertLogs:
    """Which of the chosen ``checkpoints`` log their experts on which of the chosen ``benchmarks`` (entries by name); none
    without ``settings``.

    Raises ConfigError, opened by ``where``, for patterns that match nothing.
    """

    def __init__(
        self,
        settings: LogExperts | None,
        recipes: Recipes,
        checkpoints: Sequence[str],
        benchmarks: Mapping[str, BenchmarkEntry],
        where: str,
    ) -> None:
        self.settings = settings
        self._recipes = recipes
        self._entries = benchmarks
        self._where = f"{where}: log_experts"
        self.benchmarks: list[str] = []
        self.checkpoints: list[str] = []
        self.variants: dict[str, BenchmarkEntry] = {}
        if settings is None:
            return
        asked = [name for name, entry in benchmarks.items() if not entry.control]
        self.benchmarks = self._matching("benchmarks", settings.benchmarks, asked)
        if settings.checkpoints is not None:
            self.checkpoints = self._matching("checkpoints", settings.checkpoints, checkpoints)
        else:
            self.checkpoints = [name for name in checkpoints if recipes.checkpoint(name).sparse]
        if not self.checkpoints:
            raise ConfigError(
                f"{self._where}: none of the chosen recipes adds experts; choose a sparse one under 'recipes', or name "
                "the checkpoints of a sparse backbone under 'log_experts: {checkpoints: [...]}'"
            )
        if settings.without_first:
            self.variants = {
                name + WITHOUT_FIRST: benchmarks[name].model_copy(update={"control": "without_first_expert"})
                for name in self.benchmarks
                if benchmarks[name].scored
            }

    def _matching(self, key: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                hint = did_you_mean(pattern, names)
                raise ConfigError(f"{self._where}: {key}: '{pattern}' is not chosen{hint}")
        return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]

    # ---- logs

    def spec(self) -> str:
        """What determines a log, checkpoint and questions apart."""
        return canonical_json({"layers": self.settings.layers if self.settings else None})

    @property
    def chunk_ending(self) -> str:
        """The ending of the name of a chunk's log: another one for other layers."""
        return f".experts-{short_hash(self.spec(), 8)}.parquet"

    def chunk_files(self, out: str, checkpoint: str, benchmark: str) -> list[str]:
        """The logs of the chunks of a benchmark."""
        folder = f"{out}/{checkpoint}/eval/{benchmark}/chunks"
        return chunk_files(folder, self._entries[benchmark].chunks, self.chunk_ending)

    # ---- figures

    def similarity_spec(self) -> str:
        """What determines the figures that run the model."""
        return canonical_json({"questions": self.settings.similarity_questions if self.settings else None})

    @cached_property
    def families(self) -> dict[str, MetricFamily]:
        """Every family of metrics; none where nothing is logged."""
        return families() if self.settings else {}

    def named(self, per: str, runs_model: bool) -> list[str]:
        """The families that one rule draws."""
        return [name for name, family in self.families.items() if (family.per, family.runs_model) == (per, runs_model)]

    def inputs(self, family: str, out: str, checkpoint: str, benchmark: str = "") -> list[str]:
        """The files a figure is drawn from, by what its family reads."""
        stage = self._recipes.checkpoint(checkpoint)

        def logs(checkpoints: Sequence[str], benchmarks: Sequence[str]) -> list[str]:
            return [f"{out}/{one}/eval/{name}/experts.parquet" for one in checkpoints for name in benchmarks]

        match self.families[family].reads:
            case "log":
                return logs([checkpoint], [benchmark])
            case "logs of all benchmarks":
                return logs([checkpoint], self.benchmarks)
            case "logs of the path":
                return logs(self._path(checkpoint), [benchmark])
            case "models of the path":
                return [str(one.manifest(out)) for one in stage.path() if one.sparse]
            case "model and questions":
                resources = out.replace("results", "resources", 1)
                return [str(stage.manifest(out)), f"{resources}/benchmarks/{benchmark}/manifest.json"]
            case "scores with and without the first expert":
                return [
                    f"{out}/{checkpoint}/eval/{name}/{file}"
                    for variant in self.variants
                    for name in (variant.removesuffix(WITHOUT_FIRST), variant)
                    for file in ("score.json", "per_item.jsonl")
                ]

    def _path(self, checkpoint: str) -> list[str]:
        """The logged checkpoints on the path to ``checkpoint``, itself the last."""
        place = {stage.id: n for n, stage in enumerate(self._recipes.checkpoint(checkpoint).path())}
        on_the_path = {name: place.get(self._recipes.checkpoint(name).id) for name in self.checkpoints}
        return sorted((name for name, at in on_the_path.items() if at is not None), key=lambda n: on_the_path[n] or 0)

    def figures(self, out: str = "results") -> list[str]:
        """Every figure of the analysis that has enough to read."""
        found = []
        for name, family in self.families.items():
            per_benchmark = family.per == "benchmark"
            for checkpoint in self.checkpoints:
                for benchmark in self.benchmarks if per_benchmark else [""]:
                    if len(self.inputs(name, out, checkpoint, benchmark)) >= family.least_inputs:
                        folder = f"eval/{benchmark}/experts" if per_benchmark else "experts"
                        found.append(f"{out}/{checkpoint}/{folder}/{name}.svg")
        return found
