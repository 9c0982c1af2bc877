"""The base of every benchmark: questions, references, a submission file and a score.

A benchmark is a module of this package with an instance of ``Benchmark`` named ``BENCHMARK``; modules are found by
looking (``names``, ``get``). Most of a benchmark is data: the names of its files and fields, its prompt templates and
its protocols. ``MultipleChoice``, ``YesNo`` and ``ShortAnswer`` (in modules of these names) read replies by a table of
rules.

A benchmark names its **protocols**: prompt, generation settings and scoring rule. The first is the official one and
the default. Scores of different protocols are not comparable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from string import Formatter
from typing import Any, ClassVar

from mmpipe.artifacts.files import write_jsonl
from mmpipe.benchmarks.jsonl import (
    Document,
    JsonDict,
    iter_rows,
    key,
    listed,
    numbered,
    read_document,
    records_of,
    require,
    write_document,
)
from mmpipe.benchmarks.readers import BenchmarkFiles, image_bytes
from mmpipe.benchmarks.stats import MetricEstimate, estimate_mean
from mmpipe.errors import ConfigError, DataError, did_you_mean
from mmpipe.inference.question import Question
from mmpipe.registry import load_object, modules

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Protocol:
    """Prompt, generation settings and scoring rule of a benchmark."""

    name: str
    about: str
    """One line: the source of the rule and its differences."""
    rule: str = "official"
    """The scoring rule, an entry of the benchmark's ``rules``."""
    prompt: str = "llava"
    """The prompt layout, an entry of the benchmark's ``prompts``."""
    metric: str = "accuracy"
    """Name of the headline metric."""
    scale: float = 1.0
    """The headline's value for a mean score of 1: 100 for percent."""
    digits: int | None = None
    """Decimals the official scorer prints; the headline itself is not rounded."""
    max_new_tokens: int = 128
    num_beams: int = 1
    judged: bool = False
    """Whether the rule needs the replies of a judge model."""
    aliases: tuple[str, ...] = ()
    """Other names of the protocol."""


@dataclass(frozen=True)
class JudgeRequest:
    """One question to a judge. ``candidate`` is a model's reply and therefore data, never an instruction."""

    key: str
    """The question id of the judge's reply."""
    instruction: str
    candidate: str
    context: Mapping[str, str] = field(default_factory=dict)
    """Trusted facts by name: the question, the reference answer, the content of the image."""
    max_tokens: int = 512


@dataclass(frozen=True)
class AnswerPair:
    """A reference with its answer; ``answer`` is None and ``text`` empty where there is none."""

    reference: JsonDict
    answer: JsonDict | None
    judgement: JsonDict | None = None
    """The judge model's record about this answer, for benchmarks that need one."""

    @property
    def text(self) -> str:
        return self.answer["text"] if self.answer else ""

    @property
    def verdict(self) -> str | None:
        """The judge's reply, if any."""
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
    """The unit of independent observation (a circular question, an image)."""
    parsed: str | None = None
    """The parsed answer; None where it could not be parsed."""
    answered: bool = True
    unparsed: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further fields that explain the verdict."""

    def as_json(self) -> JsonDict:
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
    metrics: JsonDict
    items: Sequence[Item]
    headline: MetricEstimate

    def as_json(self) -> JsonDict:
        """The content of ``score.json``, without the items."""
        return {
            "benchmark": self.benchmark,
            "protocol": self.protocol,
            "n": len(self.items),
            "metrics": self.metrics,
            "missing": sum(not item.answered for item in self.items),
            "unparsed": sum(item.unparsed for item in self.items),
            "duplicates": 0,  # an error
            "headline": self.headline.as_json(),
        }


class Benchmark:
    """One benchmark: its files, its questions, and the scoring of replies.

    A subclass sets the attributes and defines ``item``, the verdict on one question; whole steps (``questions``,
    ``references``, ``rate``, ``convert``) can be overridden.
    """

    name: ClassVar[str]
    protocols: ClassVar[tuple[Protocol, ...]]
    """The first is the official one."""
    files: ClassVar[Mapping[str, str]]
    """Official file names by role: ``questions``, ``images``, ...; ``prompts`` is LLaVA's question file, ``parquet``
    the hub's table."""
    VERSION: ClassVar[int] = 1
    """Raised when questions or references change, so that benchmarks are prepared again."""
    submission: ClassVar[str] = "jsonl"
    """Extension of the file that the benchmark's server or official scorer accepts."""
    indent: ClassVar[int | None] = None
    """Indentation of a JSON submission."""
    reference_roles: ClassVar[Sequence[str]] = ("questions",)
    """The files that references are read from, by role."""
    optional_roles: ClassVar[Sequence[str]] = ()
    """The same for optional files."""
    fields: ClassVar[Sequence[str]] = ()
    """Fields of every record in the official files."""
    listed_by: ClassVar[str] = ""
    """The field that ids become where the official file is ``{id: record}``."""
    hub_columns: ClassVar[Sequence[str]] = ()
    """Required columns of the hub's table."""
    hub_optional: ClassVar[Sequence[str]] = ()
    image: ClassVar[str] = "{image}"
    """Template of the file name of a record's image; empty where the table of the questions holds the images."""
    image_role: ClassVar[str] = "images"
    images_optional: ClassVar[bool] = False
    """Whether some questions have no image."""
    image_mark: ClassVar[str] = ""
    """Text before a question with an image."""
    image_column: ClassVar[str] = "image"
    """The table's column with the image."""
    prompts: ClassVar[Mapping[str, str]] = {"llava": "{question}"}
    """Templates of the user's turn by layout, filled from ``variables``."""
    recorded: ClassVar[Mapping[str, str]] = {}
    """The same for the prompt in the answer's record, where that differs."""
    carried: ClassVar[Sequence[str]] = ()
    """Fields of the reference that the answer's record has too."""
    id_field: ClassVar[str] = "question_id"
    unit_field: ClassVar[str] = "question_id"
    """Questions that share this field are one independent observation."""
    shown: ClassVar[Sequence[str]] = ()
    """Fields of the reference that the item has too."""

    # ---- questions

    def questions(self, source: BenchmarkFiles, protocol: Protocol) -> Iterator[Question]:
        """The questions in official order; LLaVA's where its question file exists.

        Raises DataError when a file lacks required fields.
        """
        if protocol.prompt == "llava" and source.has("prompts"):
            yield from self.llava_questions(source, protocol)
        else:
            records = self.references(source, protocol)
            yield from self.ask(source, protocol, records, (self.text(record, protocol) for record in records))

    def llava_questions(self, source: BenchmarkFiles, protocol: Protocol, role: str = "prompts") -> Iterator[Question]:
        """The questions of LLaVA's own file (``question_id, image, text, category`` a line), word for word.

        Raises DataError for a line without these fields.
        """
        for record in records_of([read_document(source.path(role))], ("question_id", "image", "text")):
            extra = {"category": record["category"]} if "category" in record else {}
            image = source.image(str(record["image"]))
            yield Question(id=record["question_id"], text=str(record["text"]), images=(image,), extra=extra)

    def ask(
        self, source: BenchmarkFiles, protocol: Protocol, records: Sequence[JsonDict], texts: Iterable[str]
    ) -> Iterator[Question]:
        """One question a reference, with its text and its image."""
        recorded = self.recorded.get(protocol.prompt)
        for record, text, image in zip(records, texts, self.images(source, records), strict=True):
            yield Question(
                id=self.id_of(record),
                text=text if image is None else self.image_mark + text,
                images=() if image is None else (image,),
                prompt=self.fill(recorded, record) if recorded else None,
                extra={name: record[name] for name in self.carried},
            )

    def images(self, source: BenchmarkFiles, records: Sequence[JsonDict]) -> Iterator[bytes | Path | None]:
        """The image of each record: the hub's, that of the row, or a file below ``images``; None for none."""
        if source.on_hub:
            yield from source.hub_images(self.image_column, optional=self.images_optional)
        elif self.image:
            for name in map(self.image_name, records):
                yield None if name is None else source.image(name, self.image_role)
        else:
            for place, row in enumerate(iter_rows(source.path("questions"))):
                require(row, ("image",), f"{self.name}, row {place}")
                yield image_bytes(row["image"], f"{self.name}, row {place}")

    def image_name(self, record: JsonDict) -> str | None:
        """The file name of a record's image; None where it has none."""
        return self.fill(self.image, record)

    def text(self, record: JsonDict, protocol: Protocol) -> str:
        """The user's turn of a question."""
        return self.fill(self.prompts[protocol.prompt], record)

    def variables(self, record: JsonDict) -> JsonDict:
        """Variables of the templates in ``prompts``; by default the fields of the reference."""
        return record

    def fill(self, template: str, record: JsonDict) -> str:
        """A template filled with the record's ``variables``. Raises DataError for a missing variable."""
        values = self.variables(record)
        names = [name for _, name, _, _ in Formatter().parse(template) if name]
        require(values, names, f"{self.name}, question {self.id_of(record)}")
        return template.format_map(values)

    # ---- references

    def references(self, source: BenchmarkFiles, protocol: Protocol) -> list[JsonDict]:
        """The reference records of the questions, in their order and without images."""
        if source.on_hub:
            rows = source.hub_rows(self.hub_columns, self.hub_optional)
            return self.parse_references([Document(source.files["parquet"], rows)])
        roles = (*self.reference_roles, *filter(source.has, self.optional_roles))
        return self.read_references([source.path(role) for role in roles])

    def read_references(self, paths: Sequence[Path]) -> list[JsonDict]:
        """Reference records from official files, or from JSON lines of records."""
        return self.parse_references([read_document(path) for path in paths])

    def parse_references(self, documents: Sequence[Document]) -> list[JsonDict]:
        """Reference records from official files already parsed (one document a file), or from records themselves."""
        if self.listed_by:
            documents = [Document(d.name, listed(d.content, self.listed_by)) for d in documents]
        return numbered(records_of(documents, self.fields))

    def id_of(self, reference: JsonDict) -> int | str:
        """The question's id."""
        return reference[self.id_field]

    def unit_of(self, reference: JsonDict) -> str:
        """The question's unit of independent observation; itself where it lacks the ``unit_field``."""
        unit = reference.get(self.unit_field)
        return key(self.id_of(reference) if unit in (None, "") else unit)

    def reference_keys(self, reference: JsonDict) -> list[tuple[str, ...]]:
        """The keys an answer may be matched by; the first one is unique."""
        return [(key(self.id_of(reference)),)]

    def answer_keys(self, answer: JsonDict) -> list[tuple[str, ...]]:
        """The keys to look an answer up by, in order of preference."""
        return [(key(answer["question_id"]),)]

    # ---- scores

    def rate(self, pairs: Sequence[AnswerPair], protocol: Protocol) -> tuple[list[Item], JsonDict]:
        """The verdict on every pair, and the metrics under the official scorer's names."""
        items = [self.item(pair, protocol) for pair in pairs]
        return items, self.metrics(items, pairs, protocol)

    def item(self, pair: AnswerPair, protocol: Protocol) -> Item:
        """The verdict on one question."""
        raise NotImplementedError(f"{self.name}: a benchmark defines 'item' or 'rate'")

    def result(
        self, pair: AnswerPair, score: float, parsed: str | None, unparsed: bool | None = None, /, **facts: Any
    ) -> Item:
        """The verdict with the parsed answer; 0 for a missing one. ``unparsed`` is by default whether it is None."""
        return Item(
            id=self.id_of(pair.reference),
            score=float(pair.answered and score),
            unit=self.unit_of(pair.reference),
            parsed=parsed if pair.answered else None,
            answered=pair.answered,
            unparsed=pair.answered and (parsed is None if unparsed is None else unparsed),
            facts=facts,
        )

    def metrics(self, items: Sequence[Item], pairs: Sequence[AnswerPair], protocol: Protocol) -> JsonDict:
        """The metrics under the official scorer's names; by default the headline alone."""
        value = protocol.scale * mean_score(items)
        return {protocol.metric: value if protocol.digits is None else round(value, protocol.digits)}

    def estimate(self, items: Sequence[Item], metrics: JsonDict, protocol: Protocol) -> MetricEstimate:
        """The headline number with its 95 % interval; by default the mean of the items' scores."""
        return estimate_score(protocol.metric, items, protocol.scale)

    def convert(self, pairs: Sequence[AnswerPair], out: Path) -> JsonDict:
        """Write the submission file, JSON or JSON lines; returns facts to report about it."""
        if self.submission == "json":
            write_document(out, self.document(pairs), self.indent)
        else:
            write_jsonl(out, map(self.submitted, pairs))
        return {}

    def document(self, pairs: Sequence[AnswerPair]) -> Any:
        """The content of a JSON submission; by default a list."""
        return [self.submitted(pair) for pair in pairs]

    def submitted(self, pair: AnswerPair) -> JsonDict:
        """The submission's record of a question."""
        return {"question_id": pair.reference["question_id"], "prediction": pair.text}

    def judge_request(self, pair: AnswerPair) -> JudgeRequest | None:
        """The request to the judge about an answer; None where the rule decides without one."""
        return None

    def judgement_key(self, reference: JsonDict) -> str:
        """The question id of the judge's replies."""
        return key(self.id_of(reference))

    # ---- common to all

    def protocol(self, name: str = "") -> Protocol:
        """The protocol called ``name``; ``""`` and ``official`` are the first one.

        Raises ConfigError for an unknown name.
        """
        known = {name: p for p in self.protocols for name in (p.name, *p.aliases)}
        if name in known or name in ("", "official"):
            return known.get(name, self.protocols[0])
        raise ConfigError(f"{self.name}: there is no protocol '{name}'{did_you_mean(name, known)}")

    def source(self, root: Path, files: Mapping[str, str] | None = None) -> BenchmarkFiles:
        """The official files below ``root``, with other names where ``files`` gives them.

        Raises ConfigError for a role the benchmark does not know.
        """
        for role in sorted(set(files or ()) - set(self.files)):
            raise ConfigError(f"{self.name}: no file plays the role '{role}'{did_you_mean(role, self.files)}")
        return BenchmarkFiles(root, {**self.files, **(files or {})})

    def score(
        self,
        references: Sequence[JsonDict],
        answers: Sequence[JsonDict],
        protocol: str = "",
        judgements: Sequence[JsonDict] | None = None,
    ) -> Score:
        """Score answers against references.

        A question without answer is wrong and counted. A judge's name is part of the protocol of its score
        (``mmhal@gpt-4o``). Where no protocol is named and there are no judge's replies, a protocol that needs none is
        taken; the score names it. Raises DataError for answers that are given twice or belong to no question.
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
        """The protocol to use without judge's replies. Raises DataError where the user named a judged one."""
        unjudged = [protocol for protocol in self.protocols if not protocol.judged]
        if unjudged and not named:
            return unjudged[0]
        names = " or ".join(protocol.name for protocol in unjudged)
        way_out = f"; without judge: protocol {names}" if unjudged else ""
        raise DataError(f"{self.name}: the protocol '{wanted.name}' needs the replies of a judge model{way_out}")

    def pair(
        self, references: Sequence[JsonDict], answers: Sequence[JsonDict], judgements: Sequence[JsonDict] | None = None
    ) -> list[AnswerPair]:
        """Every reference with its answer, in the order of the references.

        ``judgements`` are the judge's records; of several about one question the last one counts.
        Raises DataError for references or answers given twice and for answers that belong to no question.
        """
        if not references:
            raise DataError(f"{self.name}: there are no references to score against")
        index = self.index(references)
        found: dict[int, JsonDict] = {}
        unknown, twice = [], []
        for answer in answers:
            place = self.place(answer, index)
            if place is None:
                unknown.append(answer["question_id"])
            elif found.setdefault(place, answer) is not answer:
                twice.append(answer["question_id"])
        if unknown and len(unknown) == len(answers):
            raise DataError(
                f"{self.name}: none of the {len(answers)} answers belongs to a question of the references "
                f"(e.g. question_id {unknown[0]!r}); are they of another split?"
            )
        if unknown:
            raise DataError(f"{self.name}: answers to questions that do not exist: {_some(unknown)}")
        if twice:
            raise DataError(f"{self.name}: more than one answer to: {_some(twice)}; keep one of each")
        judged = {self.place(record, index): record for record in judgements or ()}
        if None in judged:
            unknown_id = judged[None]["question_id"]
            raise DataError(f"{self.name}: the judge's replies hold an unknown question: {unknown_id}")
        return [AnswerPair(asked, found.get(place), judged.get(place)) for place, asked in enumerate(references)]

    def place(self, answer: JsonDict, index: Mapping[tuple[str, ...], int]) -> int | None:
        """The position of an answer's reference; None where it has none. ``index`` is the result of :meth:`index`."""
        return next((index[k] for k in self.answer_keys(answer) if index.get(k, -1) >= 0), None)

    def index(self, references: Sequence[JsonDict]) -> dict[tuple[str, ...], int]:
        """The position of the reference of every key; -1 for a key that several of them share.

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


def _registered() -> dict[str, Benchmark]:
    found = (getattr(module, "BENCHMARK", None) for module in modules("mmpipe.benchmarks").values())
    return {benchmark.name: benchmark for benchmark in found if benchmark}


def names() -> list[str]:
    """Names of all benchmarks."""
    return sorted(_registered())


def get(name: str) -> Benchmark:
    """The benchmark called ``name``, or the one at ``package.module:BENCHMARK`` of the project's own.

    Raises ConfigError when there is none.
    """
    known = _registered()
    if name in known:
        return known[name]
    if ":" not in name:
        raise ConfigError(f"there is no benchmark '{name}'{did_you_mean(name, known)}")
    found = load_object(name, "benchmark")
    if not isinstance(found, Benchmark):
        raise ConfigError(f"benchmark: '{name}' is no instance of mmpipe.benchmarks.base.Benchmark")
    return found


def mean_score(items: Sequence[Item]) -> float:
    """The mean of the items' scores."""
    return fmean(item.score for item in items)


def estimate_score(metric: str, items: Sequence[Item], scale: float = 1.0) -> MetricEstimate:
    """The mean of the items' scores times ``scale``, with its 95 % interval over units."""
    return estimate_mean(metric, [item.score for item in items], [item.unit for item in items], scale)


def grouped(items: Iterable[Item], fact: str = "") -> dict[str, list[Item]]:
    """The items by one of their facts, or by unit, in order of appearance; items without the fact are left out."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        value = item.facts[fact] if fact else item.unit
        if value is not None:
            groups.setdefault(str(value), []).append(item)
    return groups


def _judge_of(judgements: Sequence[JsonDict]) -> str:
    """The judge model that all records name; empty where none does. Raises DataError for several."""
    found = sorted({str(record["judge_model"]) for record in judgements if record.get("judge_model")})
    if len(found) > 1:
        raise DataError(f"the replies are of several judges: {', '.join(found)}; score the replies of one")
    return found[0] if found else ""


def _some(ids: Sequence[Any], shown: int = 10) -> str:
    text = ", ".join(str(i)[:60] for i in ids[:shown])
    return f"{text} and {len(ids) - shown} more" if len(ids) > shown else text
