"""What every benchmark is: questions to ask, references to compare with, a submission file and a score.

A benchmark is a module of this package with an instance of ``Benchmark`` named ``BENCHMARK``. Modules are
found by looking (``names``, ``get``); there is no list to edit.

A benchmark names its **protocols**: prompt, generation settings and scoring rule. The first is the official
one and the default. Two protocols of one benchmark are different measurements; their numbers do not belong
into one column.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, ClassVar

from mmpipe.artifacts.files import write_jsonl
from mmpipe.benchmarks.jsonl import Document, read_documents
from mmpipe.benchmarks.judging import JudgeRequest
from mmpipe.benchmarks.stats import Estimate, estimate_mean
from mmpipe.errors import ConfigError, DataError, did_you_mean
from mmpipe.inference.question import Question
from mmpipe.registry import load_object, modules

Record = dict[str, Any]

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is asked and scored."""

    name: str
    about: str
    """One line: whose rule this is and where it differs."""
    rule: str = "official"
    """The scoring rule, as the benchmark's module calls it."""
    prompt: str = "llava"
    """The prompt layout, as the benchmark's module calls it."""
    max_new_tokens: int = 128
    num_beams: int = 1
    judged: bool = False
    """Whether the rule needs the replies of a judge model."""
    aliases: tuple[str, ...] = ()
    """Other names it may be asked for by."""


@dataclass(frozen=True)
class Pair:
    """A reference with the answer that was given to it; ``answer`` is None and ``text`` empty where there is
    none."""

    reference: Record
    answer: Record | None
    judgement: Record | None = None
    """The judge model's record about this answer, for benchmarks that need one."""

    @property
    def text(self) -> str:
        return self.answer["text"] if self.answer else ""

    @property
    def verdict(self) -> str | None:
        """What the judge replied; None where it did not."""
        reply = (self.judgement or {}).get("reply")
        return None if reply is None else str(reply)

    @property
    def answered(self) -> bool:
        return self.answer is not None


@dataclass(frozen=True)
class Item:
    """The verdict on one question."""

    id: int | str
    score: float
    unit: str
    """What counts as one independent observation (a circular question, an image)."""
    parsed: str | None = None
    """What was understood of the answer; None where nothing was."""
    answered: bool = True
    unparsed: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else explains the verdict."""

    def as_json(self) -> Record:
        """The record of ``per_item.jsonl``."""
        return {
            "question_id": self.id,
            "unit": self.unit,
            "score": self.score,
            "correct": self.score == 1,
            "parsed": self.parsed,
            "missing": not self.answered,
            "unparsed": self.unparsed,
            **self.facts,
        }


@dataclass(frozen=True)
class Score:
    """The score of one set of answers under one protocol."""

    benchmark: str
    protocol: str
    metrics: Record
    items: Sequence[Item]
    headline: Estimate
    duplicates: int = 0

    def as_json(self) -> Record:
        """The content of ``score.json``, without the items."""
        return {
            "benchmark": self.benchmark,
            "protocol": self.protocol,
            "n": len(self.items),
            "metrics": self.metrics,
            "missing": sum(not item.answered for item in self.items),
            "unparsed": sum(item.unparsed for item in self.items),
            "duplicates": self.duplicates,
            "headline": self.headline.as_json(),
        }


@dataclass(frozen=True)
class Source:
    """Where the official files of a benchmark lie."""

    root: Path
    files: Mapping[str, str] = field(default_factory=dict)

    def path(self, role: str) -> Path:
        """The file (or folder) that plays ``role``.

        Raises DataError when it does not exist.
        """
        path = self.inside(self.files[role])
        if not path.exists():
            raise DataError(
                f"{path}: the file with the '{role}' is not there; name it under 'files' in benchmarks.yaml"
            )
        return path

    def has(self, role: str) -> bool:
        """Whether the file that plays ``role`` exists."""
        return role in self.files and self.inside(self.files[role]).exists()

    def image(self, name: str, role: str = "images") -> Path:
        """The image ``name`` below the folder that plays ``role``.

        Raises DataError when the name leads outside or the file does not exist.
        """
        path = self.inside(f"{self.files[role]}/{name}")
        if not path.is_file():
            raise DataError(f"{path}: the image is not there; is the archive of the '{role}' unpacked?")
        return path

    def inside(self, name: str) -> Path:
        """``root / name``, for names that come from data.

        Raises DataError for absolute names and names with ``..``.
        """
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or ".." in parts:
            raise DataError(f"{self.root}: the name '{name}' leads outside of the data set")
        return self.root.joinpath(*parts)


class Benchmark(abc.ABC):
    """One benchmark. Subclasses say where its files are, what is asked, and how replies become a score."""

    name: ClassVar[str]
    protocols: ClassVar[tuple[Protocol, ...]]
    """The first is the official one."""
    files: ClassVar[Mapping[str, str]]
    """Official file names by role; ``questions`` is the one that the references are read from unless said
    otherwise."""
    VERSION: ClassVar[int] = 1
    """Raised when questions or references change, so that what was prepared before is prepared again."""
    submission: ClassVar[str] = "jsonl"
    """Extension of the file that the benchmark's server or official scorer accepts."""

    # ---- what subclasses write

    @abc.abstractmethod
    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        """The questions in official order.

        Raises DataError when a file lacks what the format promises.
        """

    @abc.abstractmethod
    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        """The reference records of the questions, in their order and without images."""

    @abc.abstractmethod
    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        """Reference records from official files already parsed (one document a file), or from records
        themselves."""

    @abc.abstractmethod
    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        """The verdict on every pair, and the metrics under the official scorer's names."""

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """Write the submission file; returns what is worth reporting about it.

        Benchmarks without a server get one line a question, ``{"question_id", "prediction"}``.
        """
        write_jsonl(out, ({"question_id": pair.reference["question_id"], "prediction": pair.text} for pair in pairs))
        return {}

    def read_references(self, paths: Sequence[Path]) -> list[Record]:
        """Reference records from official files, or from JSON lines of records."""
        return self.parse_references(read_documents(paths))

    def reference_keys(self, reference: Record) -> list[tuple[str, ...]]:
        """The keys an answer may be matched by; the first one is unique."""
        return [(key(reference["question_id"]),)]

    def answer_keys(self, answer: Record) -> list[tuple[str, ...]]:
        """The keys to look an answer up by, in order of preference."""
        return [(key(answer["question_id"]),)]

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        """The headline number with its 95 % interval; by default the mean of the items' scores."""
        return estimate_mean("accuracy", [item.score for item in items], [item.unit for item in items])

    # ---- what all share

    def protocol(self, name: str = "") -> Protocol:
        """The protocol called ``name``; ``""`` and ``official`` are the first one.

        Raises ConfigError for an unknown name.
        """
        known = {name: p for p in self.protocols for name in (p.name, *p.aliases)}
        if name in known:
            return known[name]
        if name in ("", "official"):
            return self.protocols[0]
        raise ConfigError(f"{self.name}: there is no protocol '{name}'{did_you_mean(name, known)}")

    def source(self, root: Path, files: Mapping[str, str] = MappingProxyType({})) -> Source:
        """The official files below ``root``, with other names where ``files`` gives them.

        Raises ConfigError for a role the benchmark does not know.
        """
        for role in files:
            if role not in self.files:
                raise ConfigError(f"{self.name}: no file plays the role '{role}'{did_you_mean(role, self.files)}")
        return Source(root, {**self.files, **files})

    def score(
        self,
        references: Sequence[Record],
        answers: Sequence[Record],
        protocol: str = "",
        judgements: Sequence[Record] | None = None,
    ) -> Score:
        """Score answers against references.

        A question without answer is wrong and counted. A judge's name is part of the protocol of its score
        (``mmhal@gpt-4o``). Where no protocol is named and there are no judge's
        replies, a protocol that needs none is taken; the score says which. Raises DataError for answers that
        are given twice or belong to no question.
        """
        chosen = self.protocol(protocol)
        if chosen.judged and judgements is None:
            chosen = self._without_judge(chosen, named=bool(protocol))
        pairs = self.pair(references, answers, judgements)
        items, metrics = self.rate(pairs, chosen)
        judge = _judge_of(judgements or ()) if chosen.judged else ""
        name = f"{chosen.name}@{judge}" if judge else chosen.name
        return Score(self.name, name, metrics, items, self.estimate(items, metrics, chosen))

    def _without_judge(self, wanted: Protocol, named: bool) -> Protocol:
        """The protocol to use where there are no judge's replies and nobody asked for a judged one by
        name."""
        unjudged = [protocol for protocol in self.protocols if not protocol.judged]
        if unjudged and not named:
            return unjudged[0]
        names = " or ".join(protocol.name for protocol in unjudged)
        raise DataError(
            f"{self.name}: the protocol '{wanted.name}' needs the replies of a judge model"
            + (f"; without judge: protocol {names}" if unjudged else "")
        )

    def pair(
        self, references: Sequence[Record], answers: Sequence[Record], judgements: Sequence[Record] | None = None
    ) -> list[Pair]:
        """Every reference with its answer, in the order of the references.

        ``judgements`` are the judge's records; of several about one question the last one counts.
        Raises DataError for references or answers given twice and for answers that belong to no question.
        """
        if not references:
            raise DataError(f"{self.name}: there are no references to score against")
        index = self.index(references)
        found: dict[int, Record] = {}
        unknown, twice = [], []
        for answer in answers:
            place = self.place(answer, index)
            if place is None:
                unknown.append(answer["question_id"])
            elif place in found:
                twice.append(answer["question_id"])
            else:
                found[place] = answer
        if unknown and len(unknown) == len(answers):
            raise DataError(
                f"{self.name}: none of the {len(answers)} answers belongs to a question of the references "
                f"(e.g. question_id {unknown[0]!r}); are they of another split?"
            )
        if unknown:
            raise DataError(f"{self.name}: answers to questions that do not exist: {_some(unknown)}")
        if twice:
            raise DataError(f"{self.name}: more than one answer to: {_some(twice)}; keep one of each")
        judged = {}
        for record in judgements or ():
            place = self.place(record, index)
            if place is None:
                raise DataError(f"{self.name}: the judge's replies hold an unknown question: {record['question_id']}")
            judged[place] = record
        return [Pair(reference, found.get(place), judged.get(place)) for place, reference in enumerate(references)]

    def place(self, answer: Record, index: Mapping[tuple[str, ...], int]) -> int | None:
        """Where the reference of an answer stands; None where it has none. ``index`` is what ``index`` made."""
        return next((index[k] for k in self.answer_keys(answer) if index.get(k, -1) >= 0), None)

    def judge_request(self, pair: Pair) -> JudgeRequest | None:
        """What to ask the judge about an answer; None where the rule decides without one."""
        return None

    def judgement_key(self, reference: Record) -> str:
        """The question id that the judge's replies are filed under."""
        return key(reference["question_id"])

    def index(self, references: Sequence[Record]) -> dict[tuple[str, ...], int]:
        """Every key of the references with their places; -1 for a key that several of them share.

        Raises DataError for a reference that is there twice.
        """
        index: dict[tuple[str, ...], int] = {}
        firsts: set[tuple[str, ...]] = set()
        for place, reference in enumerate(references):
            first, *others = self.reference_keys(reference)
            if first in firsts:
                raise DataError(f"{self.name}: the references hold the question {' / '.join(first)} twice")
            firsts.add(first)
            index[first] = place
            for other in others:
                if other not in firsts:
                    index[other] = -1 if other in index else place
        return index


def names() -> list[str]:
    """All benchmarks there are."""
    return [name for name, module in modules("mmpipe.benchmarks").items() if hasattr(module, "BENCHMARK")]


def get(name: str) -> Benchmark:
    """The benchmark called ``name``, or the one at ``package.module:BENCHMARK`` of the project's own.

    Raises ConfigError when there is none.
    """
    if name in names():
        return importlib.import_module(f"mmpipe.benchmarks.{name}").BENCHMARK
    if ":" in name:
        found = load_object(name, "benchmark")
        if not isinstance(found, Benchmark):
            raise ConfigError(f"benchmark: '{name}' is no instance of mmpipe.benchmarks.base.Benchmark")
        return found
    raise ConfigError(f"there is no benchmark '{name}'{did_you_mean(name, names())}")


def key(value: Any) -> str:
    """One spelling for an id that files write as a number or as a string."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def numbered(records: Sequence[Record]) -> list[Record]:
    """The records with their ``question_id``: their own, their ``id`` or ``index``, or else their place."""
    return [
        {
            "question_id": next(
                (r[n] for n in ("question_id", "questionId", "qid", "pid", "id", "index") if n in r), place
            ),
            **r,
        }
        for place, r in enumerate(records)
    ]


def require(record: Record, fields: Sequence[str], where: str) -> None:
    """Raise DataError naming the fields that ``record`` lacks."""
    lacking = [name for name in fields if name not in record]
    if lacking:
        has = ", ".join(map(str, record)) or "nothing"
        raise DataError(f"{where}: a record lacks {', '.join(lacking)} (it has {has})")


def records_of(documents: Sequence[Document], fields: Sequence[str] = ()) -> list[Record]:
    """The records of documents that are lists of records, each with the given fields.

    Raises DataError when something else is found.
    """
    records: list[Record] = []
    for document in documents:
        if not isinstance(document.content, list) or not all(isinstance(r, dict) for r in document.content):
            found = type(document.content).__name__
            raise DataError(f"{document.name}: expected a list of records, found {found}")
        for record in document.content:
            require(record, fields, document.name)
        records += document.content
    return records


def _judge_of(judgements: Sequence[Record]) -> str:
    """The judge model that all records name; empty where none does. Raises DataError for several."""
    found = sorted({str(record["judge_model"]) for record in judgements if record.get("judge_model")})
    if len(found) > 1:
        raise DataError(f"the replies are of several judges: {', '.join(found)}; score the replies of one")
    return found[0] if found else ""


def _some(ids: Sequence[Any], shown: int = 10) -> str:
    text = ", ".join(str(i)[:60] for i in ids[:shown])
    return f"{text} and {len(ids) - shown} more" if len(ids) > shown else text
