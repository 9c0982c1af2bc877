"""MMMU (Yue et al. 2023, arXiv 2311.16502): college-level questions in 30 subjects, most multiple choice,
some open.

Files are the parquet files of the validation split, one folder a subject (``id, question, options, answer,
question_type, image_1 ... image_7``; options and lists of answers are written as Python lists).

The official scorer draws a random option where it finds none in a reply, from one generator seeded with 42,
in the order of the questions. So does the default here; how many were drawn, and the accuracy without them,
stand beside it.
"""

from __future__ import annotations

import ast
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from mmpipe.benchmarks.base import (
    OPTION_LETTER,
    SHORT_ANSWER,
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
    require,
)
from mmpipe.benchmarks.choices import LETTERS, options_block
from mmpipe.benchmarks.image_bytes import hub_image
from mmpipe.benchmarks.jsonl import iter_rows, read_document, without_images, write_document
from mmpipe.benchmarks.stats import Estimate, estimate_mean
from mmpipe.errors import DataError

_FIELDS = ("id", "question", "options", "answer", "question_type")
_CHOICE = "multiple-choice"
_SEED = 42
_EDGE_MARKS = ",.!?;:'"
_IMAGE = re.compile(r"<image (\d+)>")
_SUBJECT = re.compile(r"[^_]+_(.+?)_\d+")
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)

# The subjects of the six disciplines, as the official report groups them.
_DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power", "Materials",
        "Mechanical_Engineering",
    ),
}  # fmt: skip


class Mmmu(Benchmark):
    """MMMU's validation split."""

    name = "mmmu"
    submission = "json"
    files: ClassVar[Mapping[str, str]] = {"questions": "."}
    protocols = (
        Protocol("mmmu_val", "the official parser, random option included", aliases=("llava",)),
        Protocol("norandom", "the official parser; a reply without option is wrong", rule="norandom"),
        Protocol("lmms", "lmms-eval 0.7.3 and LibMoE: 'X ' and 'X.' count as options too", rule="lmms", prompt="lmms",
                 aliases=("libmoe",)),
    )  # fmt: skip

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        for row in _rows(source.path("questions")):
            where = f"mmmu, {row['id']}"
            text, numbers = _prompt(row, protocol.prompt)
            images = tuple(hub_image(row.get(f"image_{n}"), where) for n in numbers)
            yield Question(id=row["id"], text=text, images=images)

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        return self.read_references([source.path("questions")])

    def read_references(self, paths: Sequence[Path]) -> list[Record]:
        """Besides files of records, the folder of the subjects."""
        documents = [
            Document(str(path), [without_images(row) for row in _rows(path)]) if path.is_dir() else read_document(path)
            for path in paths
        ]
        return self.parse_references(documents)

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        """Records, or the official ``answer_dict_val.json`` (``{id: {question_type, ground_truth}}``)."""
        records: list[Record] = []
        for document in documents:
            content = document.content
            if isinstance(content, dict):
                content = [_from_answer_dict(number, entry) for number, entry in content.items()]
            records += [_reference(r) for r in records_of([Document(document.name, content)])]
        return records

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        generator = random.Random(_SEED) if protocol.rule != "norandom" else None
        items = [_rate(pair, generator, loose=protocol.rule == "lmms") for pair in pairs]
        subjects: dict[str, list[float]] = {}
        for item in items:
            subjects.setdefault(item.facts["subject"], []).append(item.score)
        domains = {
            domain: [score for name in names for score in subjects.get(name, [])] for domain, names in _DOMAINS.items()
        }
        parsed = [item.score for item in items if not item.facts["random_fallback"]]
        return items, {
            "overall": fmean(item.score for item in items),
            "per_subject": {name: fmean(scores) for name, scores in subjects.items()},
            "per_domain": {name: fmean(scores) for name, scores in domains.items() if scores},
            "random_fallbacks": len(items) - len(parsed),
            "accuracy_without_random_fallback_items": fmean(parsed) if parsed else 0.0,
        }

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        return estimate_mean("overall", [i.score for i in items], [i.unit for i in items])

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """The official answer file ``{id: letter or text}``; letters by the parser without random option."""
        answers = {}
        for pair in pairs:
            reference = pair.reference
            if reference["question_type"] == _CHOICE:
                answers[reference["question_id"]] = find_option(pair.text, _options(reference)) or ""
            else:
                answers[reference["question_id"]] = pair.text
        write_document(out, answers)
        return {"without_option": sum(not answer for answer in answers.values())}


def find_option(reply: str, options: Mapping[str, str], loose: bool = False) -> str | None:
    """The letter of the option a reply names, None where it names none.

    In order: letters in brackets; letters between blanks; in replies of more than five words the options'
    texts. Of several the last one in the reply counts. ``loose`` is lmms-eval's form: a letter before a blank
    or a period is enough, but the last one is still looked up between blanks.
    """
    for mark in _EDGE_MARKS:
        reply = reply.strip(mark)
    reply = f" {reply} "
    for form, places in _forms(loose):
        named = [letter for letter in options if form.format(letter) in reply]
        if named:
            return max(named, key=lambda letter: reply.rfind(places.format(letter)))
    if len(reply.split()) <= 5:
        return None
    lowered = reply.lower()
    named = [letter for letter, text in options.items() if text.lower() in lowered]
    return max(named, key=lambda letter: lowered.rfind(options[letter].lower()), default=None)


def _forms(loose: bool) -> tuple[tuple[str, str], ...]:
    """What a named letter looks like, and what its last place is looked up by."""
    if loose:
        return (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} "))
    return (("({})", "({})"), (" {} ", " {} "))


def open_candidates(reply: str) -> list[str | float]:
    """What an open reply may mean: the ends of its lines after words such as "is" and "answer", and their
    numbers.

    Numbers are rounded to two decimals, other texts lower-cased; a text of one character gets a blank on
    either side.
    """
    whole = reply.strip().strip(".").lower()
    lines = whole.split("\n")
    ends = []
    for place, line in enumerate(lines):
        leads = (*_LEADS, "=") if place == len(lines) - 1 else _LEADS
        shortest = ""
        for lead in leads:
            if lead in line:
                tail = line.split(lead)[-1].strip()
                # as in the original, an empty end counts, and any later one replaces it
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in tuple(_EDGE_MARKS):
            ends.append(shortest)
    texts = ends or [whole]
    numbers = [number for text in texts for pattern in _NUMBERS for number in pattern.findall(text)]
    return [form for text in (*texts, *numbers) for form in normal_forms(text)]


def normal_forms(text: str) -> list[str | float]:
    """The forms in which an open answer is compared."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_match(reply: str, gold: str | Sequence[str]) -> bool:
    """Whether one of the candidates is a right number or contains a right text."""
    golds = [form for text in ([gold] if isinstance(gold, str) else gold) for form in normal_forms(str(text))]
    texts = [form for form in golds if isinstance(form, str)]
    return any(
        any(text in candidate for text in texts) if isinstance(candidate, str) else candidate in golds
        for candidate in open_candidates(reply)
    )


def _validation_files(root: Path) -> list[Path]:
    """The parquet files of validation below ``root``, also through links: an adopted folder's subjects are links."""
    folders = (Path(folder) for folder, _, _ in os.walk(root, followlinks=True))
    return sorted(path for folder in folders for path in folder.glob("*validation*.parquet"))


def _rows(root: Path) -> Iterator[Record]:
    """Rows of all subjects; of a folder the parquet files of validation, at any depth."""
    files = _validation_files(root) if root.is_dir() else [root]
    if not files:
        raise DataError(f"{root}: there are no parquet files of the validation split")
    for path in files:
        for row in iter_rows(path):
            require(row, _FIELDS, str(path))
            yield row


def _prompt(row: Record, layout: str) -> tuple[str, list[int]]:
    """The text with a mark for every image, and the numbers of the images in the order of their marks."""
    options = _list_of(row["options"])
    instruction = OPTION_LETTER if row["question_type"] == _CHOICE else SHORT_ANSWER
    if layout == "lmms":
        text = f"{row['question']}\n{options_block(options)}" if options else str(row["question"])
        text += "\n" + instruction
    elif row["question_type"] == _CHOICE:
        block = "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, options, strict=False))
        text = f"{row['question']}\n{block}{instruction}"
    else:
        text = f"{row['question']}{instruction}"
    numbers = [int(number) for number in _IMAGE.findall(text)]
    return _IMAGE.sub("<image>", text), numbers


def _from_answer_dict(number: str, entry: Record) -> Record:
    return {"id": number, "question_type": entry.get("question_type"), "answer": entry.get("ground_truth")}


def _reference(record: Record) -> Record:
    number = record.get("id", record.get("question_id"))
    require(record, ("question_type", "answer"), f"mmmu, {number}")
    found = _SUBJECT.fullmatch(str(number))
    texts = record.get("index2ans") or dict(zip(LETTERS, _list_of(record.get("options", [])), strict=False))
    letters = record.get("all_choices") or list(texts) or list("ABCD")
    answer = record["answer"]
    if record["question_type"] != _CHOICE:
        answer = _list_of(answer) if str(answer).startswith("[") else answer
    return {
        "question_id": number,
        "question_type": record["question_type"],
        "answer": answer,
        "subject": record.get("subject") or (found.group(1) if found else "unknown"),
        "all_choices": letters,
        "index2ans": {letter: str(texts.get(letter, "")) for letter in letters},
    }


def _list_of(value: Any) -> list[str]:
    """A list that may be written as a Python literal; anything else is one entry, nothing is none."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise DataError(f"mmmu: {value[:80]!r} is not a list ({error})") from error
    return [str(entry) for entry in value] if isinstance(value, list | tuple) else [str(value)] if value else []


def _options(reference: Record) -> dict[str, str]:
    """Letters and texts; where the texts are unknown, one that no reply contains."""
    return {letter: text or "\x00" for letter, text in reference["index2ans"].items()}


def _rate(pair: Pair, generator: random.Random | None, loose: bool) -> Item:
    reference = pair.reference
    fallback, parsed = False, None
    if reference["question_type"] == _CHOICE:
        options = _options(reference)
        parsed = find_option(pair.text, options, loose) if pair.answered else None
        fallback = pair.answered and parsed is None
        chosen = generator.choice(list(options)) if fallback and generator else parsed
        right = pair.answered and chosen in _golds(reference["answer"])
    else:
        gold = reference["answer"]
        # lmms-eval compares with the list as it is written
        right = pair.answered and open_match(pair.text, str(gold) if loose else gold)
        chosen = pair.text
    return Item(
        id=reference["question_id"],
        score=float(right),
        unit=key(reference["question_id"]),
        parsed=chosen if pair.answered else None,
        answered=pair.answered,
        unparsed=fallback,
        facts={"subject": reference["subject"], "gold": reference["answer"], "random_fallback": fallback},
    )


def _golds(answer: str | list[str]) -> list[str]:
    return answer if isinstance(answer, list) else [answer]


BENCHMARK = Mmmu()
