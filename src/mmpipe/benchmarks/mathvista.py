"""MathVista (Lu et al. 2023, arXiv 2310.02255): mathematics in images, multiple choice and free form.

Files are the official ``testmini.json`` (``{pid: record}``) with its images, or the parquet file of the hub
(``decoded_image`` holds the image). An answer is extracted from the reply, normalised by the question's
type and compared as text. Where the type alone does not settle it, a judge extracts; the published numbers
need that judge.

A multiple-choice extraction that is no option becomes the nearest option by edit distance, even an empty one.
A float is rounded to the question's precision; lmms-eval passes that precision as a float, which Python's
``round`` refuses, so that by its rule every float question is wrong (protocol ``libmoe``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from mmpipe.benchmarks.base import (
    OPTION_LETTER,
    Benchmark,
    Document,
    Item,
    Pair,
    Protocol,
    Question,
    Record,
    Source,
    key,
    records_of,
)
from mmpipe.benchmarks.choices import LETTERS, infer_option, options_block
from mmpipe.benchmarks.jsonl import read_document, write_document
from mmpipe.benchmarks.judging import JudgeRequest
from mmpipe.benchmarks.readers import hub_records, images_of, on_hub
from mmpipe.benchmarks.stats import Estimate, estimate_mean

_FIELDS = ("pid", "question_type", "answer_type", "answer")
_EXTRAS = ("unit", "precision", "metadata")
_CHOICE = "multi_choice"
_QUOTED = re.compile(r'The answer is "(.*)"\.')
_BRACKETED = re.compile(r"\(([a-zA-Z])\)")
_GROUPS = ("question_type", "answer_type", "category", "task", "context", "grade", "language", "source", "skills")


class MathVista(Benchmark):
    """MathVista's testmini split."""

    name = "mathvista"
    submission = "json"
    files: ClassVar[Mapping[str, str]] = {"questions": "testmini.json", "images": ".", "parquet": "data"}
    protocols = (
        Protocol("mathvista", "the official scorer with a judge's extraction", prompt="query", max_new_tokens=1024,
                 judged=True),
        Protocol("lmms", "lmms-eval, short prompt, precision as it should be", rule="lmms", prompt="format",
                 max_new_tokens=1024, judged=True),
        Protocol("lmms_cot", "the same, reasoning asked for first", rule="lmms", prompt="reason-first",
                 max_new_tokens=16384, judged=True),
        Protocol("lmms_solution", "the same, solution asked for", rule="lmms", prompt="solution",
                 max_new_tokens=16384, judged=True),
        Protocol("libmoe", "lmms-eval as LibMoE ran it: float questions are always wrong", rule="libmoe",
                 prompt="format", max_new_tokens=1024, judged=True),
        Protocol("vlmevalkit", "VLMEvalKit's check before any judge", rule="prefetch", prompt="query",
                 max_new_tokens=1024),
    )  # fmt: skip

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        records = self.references(source, protocol)
        images = images_of(source, (str(record["image"]) for record in records), column="decoded_image")
        for record, image in zip(records, images, strict=True):
            yield Question(id=record["pid"], text=prompt(record, protocol.prompt), images=(image,))

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        if on_hub(source):
            rows = hub_records(source, (*_FIELDS, "question", "choices", "query"), _EXTRAS)
            return self.parse_references([Document(source.files["parquet"], rows)])
        return self.parse_references([read_document(source.path("questions"))])

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        """Records, or the official ``{pid: record}``."""
        lists = [
            Document(d.name, [{"pid": pid, **r} for pid, r in d.content.items()]) if isinstance(d.content, dict) else d
            for d in documents
        ]
        return [{"question_id": record["pid"], **record} for record in records_of(lists, _FIELDS)]

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        if protocol.rule == "prefetch":
            items = [_prefetched(pair) for pair in pairs]
            return items, {"accuracy": fmean(item.score for item in items)}
        items = [_rate(pair, protocol.rule) for pair in pairs]
        if protocol.rule != "official":
            return items, {"accuracy": round(100 * fmean(item.score for item in items), 2)}
        return items, {**_tally(items), **_breakdown(pairs, items)}

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        scale = 100.0 if protocol.rule in ("lmms", "libmoe") else 1.0
        return estimate_mean("accuracy", [i.score for i in items], [i.unit for i in items], scale)

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """The official output file ``{pid: record}`` with the replies in ``response``, for its extraction and
        scoring scripts."""
        write_document(
            out,
            {
                key(pair.reference["pid"]): {
                    **{name: value for name, value in pair.reference.items() if name != "question_id"},
                    "response": pair.text,
                }
                for pair in pairs
            },
            indent=2,
        )
        return {}

    def judge_request(self, pair: Pair) -> JudgeRequest | None:
        """Ask for the answer inside the reply, unless the type of the question settles it."""
        if not pair.answered or settled(pair.text, pair.reference) is not None:
            return None
        reference = pair.reference
        wanted = "the option's letter" if reference["question_type"] == _CHOICE else f"the {reference['answer_type']}"
        return JudgeRequest(
            key=self.judgement_key(reference),
            instruction=(
                f"You extract answers. Give {wanted} that the response arrives at, and nothing else: no words, no "
                "unit, no explanation. A list is written as [1, 2]. If there is no answer, reply with an empty line."
            ),
            context={"question": prompt(reference, "query")},
            candidate=pair.text,
            max_tokens=64,
        )


def settled(reply: str, question: Record) -> str | None:
    """The extraction that needs no judge: nothing said, a choice word for word, a number of the right
    type."""
    if reply == "":
        return ""
    if question["question_type"] == _CHOICE and reply in (question.get("choices") or ()):
        return reply
    try:
        if question["answer_type"] == "integer":
            return str(int(reply))
        if question["answer_type"] == "float":
            return str(float(reply))
    except ValueError:
        return None
    return None


def normalise(extraction: str, question: Record, precision_as_float: bool = False) -> str | None:
    """The extraction in the form of the question's answer; None where it has no such form."""
    if question["question_type"] == _CHOICE:
        choices = [str(choice) for choice in question["choices"]]
        text = extraction.strip()
        bracketed = _BRACKETED.search(text)
        text = bracketed.group(1).upper() if bracketed else text
        if len(text) == 1 and text in LETTERS[: len(choices)]:
            return choices[LETTERS.index(text)]
        return min(choices, key=lambda choice: edit_distance(text, choice))
    try:
        if question["answer_type"] == "integer":
            return str(int(float(extraction)))
        if question["answer_type"] == "float":
            if precision_as_float:
                return None
            return str(round(float(extraction), int(question["precision"])))
    except (ValueError, OverflowError, TypeError):
        return None
    return extraction


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def prompt(question: Record, layout: str) -> str:
    """The text of a question: the official ``query``, or one of lmms-eval's layouts."""
    if layout == "query":
        return str(question["query"])
    unit = f" (Unit: {question['unit']})" if question.get("unit") else ""
    stem = f"{question['question']}{unit}"
    choices = question.get("choices") or ()
    if layout == "format":
        block = f"\n{options_block(choices)}" if choices else ""
        return f"{stem}{block}{_short_instruction(question)}"
    listed = "".join(f"\n({letter}) {c}" for letter, c in zip(LETTERS, choices, strict=False))
    block = f"\nChoices:{listed}" if choices else ""
    wanted = _wanted(question)
    if layout == "reason-first":
        act = "select the question from the choices" if choices else wanted
        return f"First perform reasoning, then finally {act} in the following format: Answer: xxx.\nQuestion: {stem}{block}"
    tail = "\nSolution:" if layout == "solution" else ""
    return f"Question: {stem}{block}\nHint: Please {wanted}.{tail}"


def _wanted(question: Record) -> str:
    """What kind of answer is asked for, with the examples of the official hint."""
    kind, answer_type = question["question_type"], question["answer_type"]
    if kind == _CHOICE:
        return "answer the question and provide the correct option letter, e.g., A, B, C, D, at the end"
    if answer_type == "integer":
        what, name, examples = "an integer answer", "value", "1, 2, 3"
    elif answer_type == "list":
        what, name, examples = "a Python list as an answer", "list", "[1, 2, 3], [1.2, 1.3, 1.4]"
    else:
        places = int(question["precision"])
        word = {1: "one decimal place", 2: "two decimal places"}.get(places, f"{places} decimal places")
        what, name = f"a floating-point number with {word}", "value"
        examples = ", ".join(f"{value:.{places}f}" for value in _EXAMPLES.get(places, (1.2, 1.3, 1.4)))
    return f"answer the question requiring {what} and provide the final {name}, e.g., {examples}, at the end"


_EXAMPLES = {1: (1.2, 1.3, 1.4), 2: (1.23, 1.34, 1.45)}


def _short_instruction(question: Record) -> str:
    if question["question_type"] == _CHOICE:
        return OPTION_LETTER
    answer_type = question["answer_type"]
    if answer_type == "integer":
        return "\nAnswer the question using a single integer number."
    if answer_type == "list":
        return "\nAnswer the question using a Python list."
    if answer_type == "float":
        places = int(question["precision"])
        word = {1: "one decimal place", 2: "two decimal places"}.get(places, f"{places} decimal places")
        return f"\nAnswer the question using a single floating-point number with {word}."
    return "\nAnswer the question using a single word or phrase."


def _rate(pair: Pair, rule: str) -> Item:
    question = pair.reference
    extraction, from_judge = _extraction(pair)
    prediction = normalise(extraction, question, precision_as_float=rule == "libmoe")
    gold = str(question["answer"])
    said = prediction if rule == "official" or prediction is None else prediction.strip()
    right = said == (gold if rule == "official" else gold.strip())
    return Item(
        id=question["pid"],
        score=float(pair.answered and right),
        unit=key(question["pid"]),
        parsed=prediction if pair.answered else None,
        answered=pair.answered,
        unparsed=pair.answered and (prediction is None or (from_judge and pair.verdict is None)),
        facts={"extraction": extraction, "gold": gold},
    )


def _extraction(pair: Pair) -> tuple[str, bool]:
    """The answer inside the reply, and whether it was for the judge to find.

    Where the judge said nothing, a quoted answer phrase is taken, as the official quick extraction does.
    """
    plain = settled(pair.text, pair.reference)
    if plain is not None:
        return plain, False
    if pair.verdict is not None:
        return pair.verdict, True
    quoted = _QUOTED.search(pair.text)
    return (quoted.group(1), False) if quoted else ("", True)


def _prefetched(pair: Pair) -> Item:
    """VLMEvalKit's check of the raw reply; zero counts as nothing found, as there."""
    question = pair.reference
    found: Any = None
    gold: Any = question["answer"]
    if question["question_type"] == _CHOICE:
        choices = [str(choice) for choice in question["choices"]]
        found = infer_option(pair.text, dict(zip(LETTERS, choices, strict=False)))
        gold = LETTERS[choices.index(str(gold))]
    else:
        try:
            kind = {"integer": int, "float": float}[question["answer_type"]]
            found, gold = kind(pair.text), kind(question["answer"])
        except (KeyError, ValueError):
            found = None
    return Item(
        id=question["pid"],
        score=float(pair.answered and bool(found) and found == gold),
        unit=key(question["pid"]),
        parsed=None if found is None or not pair.answered else str(found),
        answered=pair.answered,
        unparsed=pair.answered and found is None,
        facts={"gold": str(question["answer"])},
    )


def _tally(items: Sequence[Item]) -> Record:
    correct = int(sum(item.score for item in items))
    return {"accuracy": correct / len(items), "correct": correct, "total": len(items)}


def _breakdown(pairs: Sequence[Pair], items: Sequence[Item]) -> Record:
    """Accuracy by the kinds of questions; a question with several skills counts for each."""
    report: Record = {}
    for name in _GROUPS:
        groups: dict[str, list[Item]] = {}
        for pair, item in zip(pairs, items, strict=True):
            value = pair.reference.get(name, (pair.reference.get("metadata") or {}).get(name))
            for label in set(value) if isinstance(value, list) else [value]:
                if label is not None:
                    groups.setdefault(str(label), []).append(item)
        if groups:
            report[name] = {label: _tally(groups[label]) for label in sorted(groups)}
    return report


BENCHMARK = MathVista()
