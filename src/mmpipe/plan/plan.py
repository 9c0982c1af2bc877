"""The plan: recipes resolved into stages, their owners, specs and paths.

Plain Python on plain data: no torch, no transformers, no Snakemake. Everything the rules ask is answered here, and everything
that can be wrong in the configuration is found here, before any job starts.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import canonical_json, sha256
from mmpipe.benchmarks.base import get
from mmpipe.benchmarks.published import rows as published_rows
from mmpipe.benchmarks.spec import BenchmarkEntry
from mmpipe.errors import ConfigError, did_you_mean
from mmpipe.plan.efficiency import Savings
from mmpipe.plan.experts import ExpertLogs
from mmpipe.plan.recipes import Recipes, all_references
from mmpipe.plan.stages import StagePlan, TokensPlan
from mmpipe.plan.variants import Variant, split
from mmpipe.registry import source_file
from mmpipe.stages.base import Annotation, Encoding, StageJob

__all__ = ["Plan", "StagePlan", "TokensPlan"]


class Plan(Recipes):
    """All recipes, catalogues and choices of one configuration.

    ``config`` is the content of the main configuration file, ``root`` the project directory that holds ``config/``.
    Raises ConfigError, naming file and key, for anything that cannot be carried out.
    """

    def __init__(self, config: Mapping[str, Any], root: Path = Path(), where: str = "config") -> None:
        super().__init__(config, root, where)
        self.chosen_recipes  # noqa: B018 - an unknown name in the configuration is found here
        self.expert_logs = ExpertLogs(self)
        self.benchmarks |= self.expert_logs.variants
        self.savings = Savings(self)

    @cached_property
    def chosen_recipes(self) -> list[str]:
        """The checkpoints to compare, patterns (``demo-*``, ``demo@*``) expanded, in the order of the configuration;
        sparsified ones also at every rate of ``keep_rates``."""
        last = {recipe: path[-1].name for recipe, path in self._paths.items()}
        full = [f"{recipe}@{stage.name}" for recipe, path in self._paths.items() for stage in path]
        projectors = {
            f"{recipe}@{stage.name}"
            for recipe, path in self._paths.items()
            for stage in path
            if stage.settings.PUBLISHES == "projector"
        }
        chosen: dict[str, None] = {}
        for wanted in self.config.recipes:
            pattern, variant = split(wanted, f"{self.where}: recipes")
            names = full if "@" in pattern else self.recipes
            # a projector that saw captions alone answers no questions: only who names it gets it
            hits = [hit for hit in fnmatch.filter(names, pattern) if hit == pattern or hit not in projectors]
            if not hits:
                hint = did_you_mean(pattern, names)
                raise ConfigError(f"{self.where}: recipes: there is no recipe '{pattern}'{hint}")
            for hit in hits:
                recipe, _, stage = hit.partition("@")
                name = recipe if stage == last[recipe] else hit
                chosen |= dict.fromkeys(self._variants(name, variant))
        return list(chosen)

    def _variants(self, name: str, variant: Variant | None) -> list[str]:
        """The variant of a checkpoint that is asked for; without one, itself and what ``keep_rates`` adds."""
        if variant:
            self.checkpoint(f"{name}{variant.suffix}", f"{self.where}: recipes")
            return [f"{name}{variant.suffix}"]
        rates = self.config.keep_rates if self.checkpoint(name).sparsified else []
        return [name, *(f"{name}{Variant(rate).suffix}" for rate in rates)]

    def spec(self, stage: StagePlan) -> str:
        """Canonical JSON of what determines a stage's checkpoint, hardware left out."""
        content: dict[str, Any] = {
            "stage": stage.kind,
            "version": type(stage.settings).VERSION,
            "settings": stage.settings.spec(),
            "parent": stage.parent.id if stage.parent else None,
            "model": stage.vision_language.model_dump(mode="json", exclude_defaults=True),
        }
        for key, facts in (("layouts", self.layouts(stage)), ("subfolders", self._subfolders(stage))):
            if facts:
                content[key] = facts
        references = {role: self.checkpoint(ref).id for role, ref in all_references(stage.settings).items()}
        if references:
            content["references"] = references
        return canonical_json(content)

    def inputs(self, stage: StagePlan, out: str = "results") -> dict[str, Path]:
        """The manifests a stage is made from, by role."""
        inputs = {
            role: Path("resources/backbones", name, "manifest.json") for role, name in self.backbones_of(stage).items()
        }
        if stage.parent:
            inputs["parent"] = stage.parent.manifest(out)
        if tokens := self.tokens_of(stage):
            inputs["tokens"] = tokens.directory / "manifest.json"
        for role, reference in stage.settings.references().items():
            inputs[role] = self.checkpoint(reference).manifest(out)
        for role, annotation in stage.settings.annotations().items():
            inputs[f"{role}_annotations"] = self.annotation_directory(annotation, out) / "manifest.json"
        return inputs

    @staticmethod
    def backbones_of(stage: StagePlan) -> dict[str, str]:
        """The backbones a stage reads, by role. After a whole checkpoint was brought in, everything is in the parent."""
        model = stage.vision_language
        return {} if model.checkpoint and stage.parent else model.parts()

    def backbone_directory(self, name: str) -> Path:
        """Where the files of a backbone lie."""
        return Path("resources/backbones", name, self.backbones[name].subfolder or "")

    def layouts(self, stage: StagePlan) -> dict[str, str]:
        """The layouts of the backbones a stage reads, by role; the stock one is left out."""
        named = {role: self.backbones[name].layout for role, name in self.backbones_of(stage).items()}
        return {role: layout for role, layout in named.items() if layout != "hf"}

    def _subfolders(self, stage: StagePlan) -> dict[str, str]:
        named = {role: self.backbones[name].subfolder for role, name in self.backbones_of(stage).items()}
        return {role: folder for role, folder in named.items() if folder}

    def annotation_spec(self, annotation: Annotation) -> str:
        """What determines annotations, the manifests of checkpoint and mixture apart."""
        return canonical_json(
            {
                "version": annotation.VERSION,
                "checkpoint": self.checkpoint(annotation.checkpoint).id,
                "mixture": annotation.mixture,
                "settings": dict(annotation.settings),
            }
        )

    def annotation_directory(self, annotation: Annotation, out: str = "results") -> Path:
        """Where annotations are published; students that ask for the same share them."""
        key = hashlib.sha256(self.annotation_spec(annotation).encode()).hexdigest()[:12]
        return Path(_resources(out), "teacher", self.checkpoint(annotation.checkpoint).id, annotation.mixture, key)

    def annotation_chunks(self, annotation: Annotation, out: str = "results") -> list[str]:
        """The files by which the jobs that annotate say what they wrote."""
        directory = self.annotation_directory(annotation, out)
        folder = directory.parent / "chunks" / directory.name
        chunks = self.checkpoint(annotation.checkpoint).answering.chunks
        return [f"{folder}/{index:04d}-of-{chunks:04d}.json" for index in range(chunks)]

    @cached_property
    def annotations(self) -> dict[str, Annotation]:
        """Every annotation some stage asks for, by ``checkpoint/mixture/key``."""
        root = Path("resources/teacher")
        return {
            self.annotation_directory(annotation).relative_to(root).as_posix(): annotation
            for stage in self.stages()
            for annotation in stage.settings.annotations().values()
        }

    def tokens_of(self, stage: StagePlan) -> TokensPlan | None:
        """The tokens a stage trains on."""
        mixture, encoding = stage.settings.mixture(), stage.settings.encoding()
        return self._tokens(mixture, stage, encoding) if mixture and encoding else None

    def annotated_tokens(self, annotation: Annotation) -> TokensPlan:
        """The mixture as the annotating model reads it."""
        encoding = Encoding(annotation.settings["template"], annotation.settings["max_length"])
        return self._tokens(annotation.mixture, self.checkpoint(annotation.checkpoint), encoding)

    def _tokens(self, mixture: str, stage: StagePlan, encoding: Encoding) -> TokensPlan:
        first = stage.path()[0]
        model = first.vision_language
        if model.checkpoint:
            # a whole model tells its tokenizer when it has been brought in
            manifest = first.manifest()
            origin: dict[str, Any] = {"checkpoint": first.id}
            return TokensPlan(
                mixture, encoding, origin, model, {"checkpoint": manifest}, {"checkpoint": manifest.parent}, {}
            )
        names, layouts = self.backbones_of(first), self.layouts(first)
        origin = {**names, "feature_select": model.feature_select}
        if layouts:
            origin["layouts"] = layouts
        return TokensPlan(
            mixture,
            encoding,
            origin,
            model,
            {role: Path("resources/backbones", name, "manifest.json") for role, name in names.items()},
            {role: self.backbone_directory(name) for role, name in names.items()},
            layouts,
        )

    @cached_property
    def tokens(self) -> dict[str, TokensPlan]:
        """All tokens some stage or annotation needs, by key."""
        wanted = [
            *(self.tokens_of(stage) for stage in self.stages()),
            *map(self.annotated_tokens, self.annotations.values()),
        ]
        return {tokens.key: tokens for tokens in wanted if tokens}

    def benchmark_entry(self, name: str, smoke: bool = False) -> BenchmarkEntry:
        """A benchmark's settings; smoke runs ask a few questions only."""
        entry = self.benchmarks[name]
        return entry.model_copy(update={"limit": self.config.smoke.questions}) if smoke else entry

    def benchmark_spec(self, name: str, smoke: bool = False) -> str:
        """What determines a benchmark's questions and references."""
        how = {"chunks", "batch_size", "title", "scored", "judge", "questions"}
        entry = self.benchmark_entry(name, smoke)
        content = entry.model_dump(mode="json", exclude_defaults=True, exclude=how)
        version = get(entry.task).VERSION
        if version > 1:
            content["version"] = version
        if ":" in entry.task:
            content["code"] = sha256(source_file(entry.task))
        return canonical_json(content)

    def benchmark_inputs(self, name: str) -> str:
        """The manifest of the data set a benchmark reads."""
        return f"resources/datasets/{self.benchmarks[name].data}/manifest.json"

    def chunk_files(self, out: str, checkpoint: str, benchmark: str) -> list[str]:
        """The answer chunks of a benchmark."""
        chunks = self.benchmarks[benchmark].chunks
        folder = f"{out}/{checkpoint}/eval/{benchmark}/chunks"
        return [f"{folder}/{index:04d}-of-{chunks:04d}.jsonl" for index in range(chunks)]

    def controls(self, benchmark: str) -> list[str]:
        """Chosen benchmarks that ask the same questions under a control, to be shown beside ``benchmark``."""
        entry = self.benchmarks[benchmark]
        if entry.control:
            return []
        same = {"control": None, "title": "", "chunks": 1, "batch_size": 1, "judge": None, "questions": None}
        return [
            name
            for name in self.chosen_benchmarks
            if self.benchmarks[name].control
            and self.benchmarks[name].model_copy(update=same) == entry.model_copy(update=same)
        ]

    def score_files(self, out: str, benchmark: str) -> list[str]:
        """The scores a comparison reads, those of controls included."""
        return [
            f"{out}/{checkpoint}/eval/{name}/score.json"
            for name in (benchmark, *self.controls(benchmark))
            for checkpoint in self.chosen_recipes
        ]

    def leaderboard_files(self, out: str) -> list[str]:
        """Scores and verdicts of every chosen checkpoint on every compared benchmark."""
        return [
            f"{out}/{checkpoint}/eval/{benchmark}/{file}"
            for benchmark in self.compared_benchmarks
            for checkpoint in self.chosen_recipes
            for file in ("score.json", "per_item.jsonl")
        ]

    def judge_files(self, out: str, checkpoint: str, benchmark: str) -> list[str]:
        """The judge's replies that a score reads, if a judge is asked."""
        return [f"{out}/{checkpoint}/eval/{benchmark}/judge.jsonl"] if self.benchmarks[benchmark].judge else []

    def judge_spec(self, benchmark: str) -> str:
        """Which judge is asked; how patiently does not change its replies."""
        judge = self.benchmarks[benchmark].judge
        return canonical_json(judge.model_dump(include={"base_url", "model", "temperature"}) if judge else None)

    def published(self, benchmark: str) -> str:
        """The published figures of what ``benchmark`` asks, as canonical JSON."""
        return canonical_json(published_rows(self._published, get(self.benchmarks[benchmark].task).name))

    def prepared_benchmarks(self, smoke: str = "") -> list[str]:
        """Manifests of the chosen benchmarks' questions, controls apart; ``smoke`` is the folder of smoke runs."""
        return [
            f"resources/{smoke}benchmarks/{name}/manifest.json"
            for name in self.chosen_benchmarks
            if not self.benchmarks[name].control
        ]

    @property
    def scored_benchmarks(self) -> list[str]:
        """Chosen benchmarks that can be scored here."""
        return [name for name in self.chosen_benchmarks if self.benchmarks[name].scored]

    @property
    def compared_benchmarks(self) -> list[str]:
        """Chosen benchmarks with a comparison of their own; controls stand in that of another."""
        return [name for name in self.scored_benchmarks if not self.benchmarks[name].control]

    def per_checkpoint(self, file: str, out: str = "results") -> list[str]:
        """One file of every chosen checkpoint and benchmark; only scored ones have more than answers."""
        benchmarks = self.chosen_benchmarks if file == "answers.jsonl" else self.scored_benchmarks
        return [
            f"{out}/{checkpoint}/eval/{benchmark}/{file}"
            for checkpoint in self.chosen_recipes
            for benchmark in benchmarks
        ]

    def submissions(self, out: str = "results") -> list[str]:
        """The submission of every chosen checkpoint, as it was trained, to every chosen benchmark that is no control."""
        return [
            f"{out}/{checkpoint}/submit/{benchmark}.{get(self.benchmarks[benchmark].task).submission}"
            for checkpoint in self.chosen_recipes
            for benchmark in self.chosen_benchmarks
            if not self.benchmarks[benchmark].control and not split(checkpoint)[1]
        ]

    def chosen_stages(self) -> list[StagePlan]:
        """Every stage on the paths of the chosen checkpoints, each once, first ones first."""
        path = [s for reference in self.chosen_recipes for s in self.checkpoint(reference).path()]
        return list({stage.id: stage for stage in path}.values())

    def report_items(self, out: str = "results") -> list[str]:
        """What the report shows beside the comparisons."""
        stages = self.chosen_stages()
        mixtures = sorted({m for stage in stages if (m := stage.settings.mixture())})
        tokens = sorted({t.directory for stage in stages if (t := self.tokens_of(stage))})
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
            *self.savings.report_items(out),
        ]

    def job(self, stage: StagePlan, out: str = "results", **use: Any) -> StageJob:
        """The job that makes a stage; ``use`` gives threads, gpus and log."""
        inputs = self.inputs(stage, out)
        directory = stage.directory(out)
        return StageJob(
            recipe=stage.owner,
            stage=stage.name,
            spec=self.spec(stage),
            model_dir=directory / "model",
            state_dir=directory / "state",
            report_dir=directory / "report",
            vision_language=stage.vision_language,
            backbones={role: self.backbone_directory(name) for role, name in self.backbones_of(stage).items()},
            layouts=self.layouts(stage),
            parent=inputs["parent"].parent if "parent" in inputs else None,
            references={role: inputs[role].parent for role in stage.settings.references()},
            annotations={role: inputs[f"{role}_annotations"].parent for role in stage.settings.annotations()},
            tokens=inputs["tokens"].parent if "tokens" in inputs else None,
            manifests=tuple(inputs.values()),
            max_steps=self.config.smoke.max_steps if out.endswith("/smoke") else None,
            **use,
        )

    def warnings(self) -> Iterator[str]:
        """Stages that would be trained twice with the same settings on the same ancestors."""
        seen: dict[str, StagePlan] = {}
        for stage in self.stages():
            chain = canonical_json(
                [[s.kind, s.settings.spec(), self.spec(s) if not s.parent else ""] for s in stage.path()]
            )
            other = seen.setdefault(chain, stage)
            if other is not stage:
                yield f"{stage.id} equals {other.id}: let one recipe extend the other to train it once"


def _resources(out: str) -> str:
    """The folder of made things beside ``results`` or ``results/smoke``."""
    return out.replace("results", "resources", 1)
