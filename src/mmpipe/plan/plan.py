"""The plan of a configuration: stages and benchmarks with their specs, inputs and paths.

Plain Python on plain data: no torch, no transformers, no Snakemake. Every error in the configuration is found here, before
any job starts. :class:`Plan` combines the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import canonical_json
from mmpipe.plan.benchmarks import Evaluation
from mmpipe.plan.catalogues import Catalogues
from mmpipe.plan.config import Config
from mmpipe.plan.configfile import refuse_expressions
from mmpipe.plan.efficiency import Efficiency
from mmpipe.plan.experts import ExpertLogs
from mmpipe.plan.fetched import check_patterns, position_warnings
from mmpipe.plan.inputs import Precomputations, TokensPlan, backbone_manifest, tokens_of
from mmpipe.plan.recipes import Recipes
from mmpipe.plan.stages import StagePlan
from mmpipe.settings import validate
from mmpipe.stages.base import Precomputation, StageJob

__all__ = ["Plan", "StagePlan", "TokensPlan"]


class Plan:
    """The interface of one configuration for rules, jobs and the command line.

    ``config`` is the content of the main configuration file, ``root`` the project directory that holds ``config/``.
    Raises ConfigError, naming file and key, for an invalid configuration.
    """

    def __init__(self, config: Mapping[str, Any], root: Path = Path(), where: str = "config") -> None:
        refuse_expressions(config, where)
        # every part gets what it reads, and is accessible under the names below
        self.config: Config = validate(Config, dict(config), where)
        catalogues = self._catalogues = Catalogues(self.config, root, where)
        self.backbones, self.datasets, self.mixtures = catalogues.backbones, catalogues.datasets, catalogues.mixtures
        self.source_spec, self.source_inputs = catalogues.source_spec, catalogues.source_inputs
        self.mixture_spec, self.mixture_inputs = catalogues.mixture_spec, catalogues.mixture_inputs
        self.backbone_directory, self.fetched_datasets = catalogues.backbone_directory, catalogues.fetched_datasets

        recipes = self._recipes = Recipes(root, catalogues, self.config, where)
        self.recipes, self.chosen_recipes = recipes.names, recipes.chosen()
        self.stages, self.stage, self.checkpoint = recipes.stages, recipes.stage, recipes.checkpoint
        self.needed, self.family, self.nodes = recipes.needed, recipes.family, recipes.nodes

        check_patterns(recipes.stages(), catalogues)
        requests = self._precomputations = Precomputations(recipes, catalogues)
        self.precomputation_spec, self.precomputation_directory = requests.spec, requests.directory
        self.precomputation_chunks, self.precomputation_tokens = requests.chunks, requests.tokens

        chosen, entries = catalogues.chosen_benchmarks, catalogues.benchmarks
        self.expert_logs = ExpertLogs(
            self.config.log_experts, recipes, self.chosen_recipes, {name: entries[name] for name in chosen}, where
        )
        self.benchmarks, self.chosen_benchmarks = entries | self.expert_logs.variants, chosen
        evaluation = Evaluation(
            self.benchmarks, chosen, self.chosen_recipes, catalogues.published, self.config.smoke.questions
        )
        self.scored_benchmarks, self.compared_benchmarks = evaluation.scored, evaluation.compared
        self.benchmark_entry, self.benchmark_spec = evaluation.entry, evaluation.spec
        self.benchmark_inputs, self.prepared_benchmarks = evaluation.inputs, evaluation.prepared
        self.chunk_files, self.per_checkpoint = evaluation.chunk_files, evaluation.per_checkpoint
        self.judge_files, self.judge_spec = evaluation.judge_files, evaluation.judge_spec
        self.controls, self.score_files = evaluation.controls, evaluation.score_files
        self.published, self.leaderboard_files = evaluation.published, evaluation.leaderboard_files
        self.submissions = evaluation.submissions
        self.efficiency = Efficiency(recipes, self.chosen_recipes, evaluation, self.config.keep_rates)

    # ---- stages

    def chosen_stages(self) -> list[StagePlan]:
        """Every stage on the paths of the chosen checkpoints, each once, first ones first."""
        path = [stage for reference in self.chosen_recipes for stage in self.checkpoint(reference).path()]
        return list({stage.id: stage for stage in path}.values())

    def fetched_sources(self, stages: Iterable[StagePlan], benchmarks: Iterable[str] = ()) -> list[tuple[str, str]]:
        """Catalogue and name of every entry that must be fetched for some stages and benchmarks."""
        backbones, datasets = set(), [self.benchmarks[name].data for name in benchmarks]
        for stage in stages:
            backbones |= {*stage.backbones().values()}
            if mixture := stage.settings.mixture():
                datasets += [part.dataset for part in self.mixtures[mixture].parts]
        fetched = self.fetched_datasets(datasets)
        return [*(("backbones", name) for name in sorted(backbones)), *(("datasets", name) for name in fetched)]

    def spec(self, stage: StagePlan) -> str:
        """Canonical JSON of what determines a stage's checkpoint, hardware left out."""
        backbones = stage.backbones()
        content: dict[str, Any] = {
            "stage": stage.kind,
            "version": type(stage.settings).VERSION,
            "settings": stage.settings.spec(),
            "parent": stage.parent.id if stage.parent else None,
            "model": stage.vision_language.identity(),
        }
        optional = {
            "layouts": self._catalogues.layouts(backbones),
            "subfolders": self._catalogues.subfolders(backbones),
            "references": {role: self.checkpoint(name).id for role, name in stage.references().items()},
        }
        return canonical_json(content | {key: facts for key, facts in optional.items() if facts})

    def comparison_spec(self, benchmark: str) -> str:
        """Canonical JSON of the words of a comparison: its title, the marks of controls, the families of seeds."""
        title, families = self.benchmarks[benchmark].title, {name: self.family(name) for name in self.chosen_recipes}
        controls = {name: self.benchmarks[name].control for name in self.controls(benchmark)}
        return canonical_json({"title": title, "controls": controls, "families": families})

    def ranking_spec(self) -> str:
        """Canonical JSON of the families of seeds that a leaderboard joins."""
        return canonical_json({name: self.family(name) for name in self.chosen_recipes})

    def inputs(self, stage: StagePlan, out: str = "results") -> dict[str, Path]:
        """The manifests a stage is made from, by role."""
        inputs = {role: backbone_manifest(name) for role, name in stage.backbones().items()}
        if stage.parent:
            inputs["parent"] = stage.parent.manifest(out)
        if tokens := self.tokens_of(stage):
            inputs["tokens"] = tokens.directory / "manifest.json"
        for role, reference in stage.settings.references().items():
            inputs[role] = self.checkpoint(reference).manifest(out)
        for role, request in stage.settings.precomputations().items():
            inputs[f"{role}_precomputed"] = self.precomputation_directory(request, out) / "manifest.json"
        return inputs

    def job(self, stage: StagePlan, out: str = "results", **use: Any) -> StageJob:
        """The job that makes a stage; ``use`` gives threads, gpus and log."""
        inputs = self.inputs(stage, out)
        directory = stage.directory(out)
        backbones = stage.backbones()
        return StageJob(
            recipe=stage.owner,
            stage=stage.name,
            spec=self.spec(stage),
            model_dir=directory / "model",
            state_dir=directory / "state",
            report_dir=directory / "report",
            vision_language=stage.vision_language,
            backbones={role: self.backbone_directory(name) for role, name in backbones.items()},
            layouts=self._catalogues.layouts(backbones),
            parent=inputs["parent"].parent if "parent" in inputs else None,
            references={role: inputs[role].parent for role in stage.settings.references()},
            precomputed={role: inputs[f"{role}_precomputed"].parent for role in stage.settings.precomputations()},
            tokens=inputs["tokens"].parent if "tokens" in inputs else None,
            manifests=tuple(inputs.values()),
            max_steps=self.config.smoke.max_steps if out.endswith("/smoke") else None,
            **use,
        )

    # ---- tokens and precomputed log-probabilities

    def tokens_of(self, stage: StagePlan) -> TokensPlan | None:
        """The tokens a stage trains on."""
        mixture, encoding = stage.settings.mixture(), stage.settings.encoding()
        return tokens_of(self._catalogues, mixture, stage, encoding) if mixture and encoding else None

    @cached_property
    def precomputations(self) -> dict[str, Precomputation]:
        """Every precomputation that a stage requests, by ``checkpoint/mixture/key``."""
        return self._precomputations.all()

    @cached_property
    def tokens(self) -> dict[str, TokensPlan]:
        """All tokens some stage or precomputation needs, by key."""
        wanted = [*map(self.tokens_of, self.stages()), *map(self.precomputation_tokens, self.precomputations.values())]
        return {tokens.key: tokens for tokens in wanted if tokens}

    # ---- the report and warnings

    def announcement(self, stages: Iterable[StagePlan], smoke: bool) -> str:
        """The line printed before the first job of a run that trains ``stages``; empty without stages."""
        found = sorted({stage.id: stage for stage in stages}.items())
        if not found:
            return ""
        names = ", ".join(name for name, _ in found[:8]) + (", ..." if len(found) > 8 else "")
        gpus = max(stage.settings.hardware.gpus for _, stage in found)
        length = f"{self.config.smoke.max_steps} steps each (smoke)" if smoke else "in full"
        where = f"on up to {gpus} GPUs" if gpus else "on the CPU"
        count = "1 stage" if len(found) == 1 else f"{len(found)} stages"
        return f"This run trains {count} {where}, {length}: {names}. What each needs: mmpipe plan"

    def report_items(self, out: str = "results") -> list[str]:
        """The pages of the report besides the comparisons."""
        stages = self.chosen_stages()
        mixtures = sorted({mixture for stage in stages if (mixture := stage.settings.mixture())})
        tokens = sorted({tokens.directory for stage in stages if (tokens := self.tokens_of(stage))})
        return [
            *(f"{stage.directory(out)}/report/settings.html" for stage in stages),
            *(f"{stage.directory(out)}/report/loss.svg" for stage in stages if stage.settings.mixture()),
            *(f"resources/mixtures/{mixture}/report.html" for mixture in mixtures),
            *(f"{directory}/report.html" for directory in tokens),
            *(f"{out}/overlap/{mixture}.html" for mixture in mixtures),
            *self.per_checkpoint("samples.html", out),
            *(f"{out}/{benchmark}.html" for benchmark in self.compared_benchmarks),
            *([f"{out}/leaderboard.html"] if len(self.chosen_recipes) > 1 and self.compared_benchmarks else []),
            *self.expert_logs.figures(out),
            *self.efficiency.report_items(out),
        ]

    def warnings(self) -> Iterator[str]:
        """Stages that would be trained twice with the same settings on the same ancestors, and those of too few
        positions for their ``max_length``."""
        yield from position_warnings(self.stages(), self._catalogues)
        seen: dict[str, StagePlan] = {}
        for stage in self.stages():
            chain = canonical_json(
                [[s.kind, s.settings.spec(), self.spec(s) if not s.parent else ""] for s in stage.path()]
            )
            other = seen.setdefault(chain, stage)
            if other is not stage:
                yield f"{stage.id} equals {other.id}: let one recipe extend the other to train it once"
