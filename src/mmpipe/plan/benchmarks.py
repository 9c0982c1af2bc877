"""The benchmarks of a configuration: specs of their questions, and the files of answers and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmpipe.artifacts.files import canonical_json, sha256
from mmpipe.benchmarks.base import get
from mmpipe.benchmarks.published import PublishedTable
from mmpipe.benchmarks.published import rows as published_rows
from mmpipe.benchmarks.spec import BenchmarkEntry
from mmpipe.escapes import redacted
from mmpipe.plan.inputs import chunk_files
from mmpipe.plan.variants import split
from mmpipe.registry import source_file


class Evaluation:
    """The questions put to the chosen ``checkpoints``. ``entries`` are all benchmarks, ``chosen`` those to answer;
    smoke runs ask ``smoke_questions`` of each."""

    def __init__(
        self,
        entries: Mapping[str, BenchmarkEntry],
        chosen: Sequence[str],
        checkpoints: Sequence[str],
        published: Mapping[str, PublishedTable],
        smoke_questions: int,
    ) -> None:
        self.entries = entries
        self.chosen = chosen
        self._checkpoints = checkpoints
        self._published = published
        self._smoke_questions = smoke_questions
        self.scored = [name for name in chosen if entries[name].scored]
        """Chosen benchmarks that can be scored here."""
        self.compared = [name for name in self.scored if not entries[name].control]
        """Chosen benchmarks with their own comparison; controls are in that of another."""
        self.uncontrolled = [name for name in chosen if not entries[name].control]
        """Chosen benchmarks that are not controls."""

    def entry(self, name: str, smoke: bool = False) -> BenchmarkEntry:
        """A benchmark's settings; smoke runs have fewer questions."""
        entry = self.entries[name]
        return entry.model_copy(update={"limit": self._smoke_questions}) if smoke else entry

    def spec(self, name: str, smoke: bool = False) -> str:
        """What determines a benchmark's questions and references."""
        how = {"chunks", "batch_size", "title", "scored", "judge", "questions"}
        entry = self.entry(name, smoke)
        content = entry.identity(exclude=how)
        version = get(entry.task).VERSION
        if version > 1:
            content["version"] = version
        if ":" in entry.task:
            content["code"] = sha256(source_file(entry.task))
        return canonical_json(content)

    def inputs(self, name: str) -> str:
        """The manifest of the data set a benchmark reads."""
        return f"resources/datasets/{self.entries[name].data}/manifest.json"

    def prepared(self, smoke: str = "") -> list[str]:
        """Manifests of the chosen benchmarks' questions, controls apart; ``smoke`` is the folder of smoke runs."""
        return [f"resources/{smoke}benchmarks/{name}/manifest.json" for name in self.uncontrolled]

    def chunk_files(self, out: str, checkpoint: str, benchmark: str) -> list[str]:
        """The answer chunks of a benchmark."""
        return chunk_files(f"{out}/{checkpoint}/eval/{benchmark}/chunks", self.entries[benchmark].chunks, ".jsonl")

    def controls(self, benchmark: str) -> list[str]:
        """Chosen controls with the same questions, shown beside ``benchmark``."""
        entry = self.entries[benchmark]
        if entry.control:
            return []
        same = {"control": None, "title": "", "chunks": 1, "batch_size": 1, "judge": None, "questions": None}
        wanted = entry.model_copy(update=same)
        controls = (name for name in self.chosen if self.entries[name].control)
        return [name for name in controls if self.entries[name].model_copy(update=same) == wanted]

    def score_files(self, out: str, benchmark: str) -> list[str]:
        """The scores a comparison reads, those of controls included."""
        return [
            f"{out}/{checkpoint}/eval/{name}/score.json"
            for name in (benchmark, *self.controls(benchmark))
            for checkpoint in self._checkpoints
        ]

    def leaderboard_files(self, out: str) -> list[str]:
        """Scores and verdicts of every chosen checkpoint on every compared benchmark."""
        return [
            f"{out}/{checkpoint}/eval/{benchmark}/{file}"
            for benchmark in self.compared
            for checkpoint in self._checkpoints
            for file in ("score.json", "per_item.jsonl")
        ]

    def judge_files(self, out: str, checkpoint: str, benchmark: str) -> list[str]:
        """The judge's replies that a score reads, if there is a judge."""
        return [f"{out}/{checkpoint}/eval/{benchmark}/judge.jsonl"] if self.entries[benchmark].judge else []

    def judge_spec(self, benchmark: str) -> str:
        """Spec of a judge's replies, without retries and budgets."""
        judge = self.entries[benchmark].judge
        if judge is None:
            return canonical_json(None)
        settings = judge.model_dump(include={"base_url", "model", "temperature"})
        return canonical_json(settings | {"base_url": redacted(judge.base_url, environment=False)})

    def published(self, benchmark: str) -> str:
        """The published figures on the questions of ``benchmark``, as canonical JSON."""
        return canonical_json(published_rows(self._published, get(self.entries[benchmark].task).name))

    def per_checkpoint(self, file: str, out: str = "results") -> list[str]:
        """One file of every chosen checkpoint and benchmark; only scored ones have more than answers."""
        benchmarks = self.chosen if file == "answers.jsonl" else self.scored
        return [
            f"{out}/{checkpoint}/eval/{benchmark}/{file}"
            for checkpoint in self._checkpoints
            for benchmark in benchmarks
        ]

    def submissions(self, out: str = "results") -> list[str]:
        """The submission of every chosen checkpoint, variants left out, to every chosen benchmark that is not a control."""
        return [
            f"{out}/{checkpoint}/submit/{benchmark}.{get(self.entries[benchmark].task).submission}"
            for checkpoint in self._checkpoints
            for benchmark in self.uncontrolled
            if not split(checkpoint)[1]
        ]
