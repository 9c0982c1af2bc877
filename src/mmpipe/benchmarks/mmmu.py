"""MMMU (Yue et al. 2023, arXiv 2311.16502): college-level questions in 30 subjects, most multiple choice, some open.

Files are the parquet files of the validation split, one folder a subject (``id, question, options, answer,
question_type, image_1 ... image_7``; options and lists of answers are written as Python lists).

The official scorer (``mmmu/utils/eval_utils.py``) draws a random option where it finds none in a reply, from one
generator seeded with 42, in the order of the questions. So does the default here; the number of draws, and the accuracy
without them, are reported beside it.
"""

from __future__ import annotations

import ast
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpipe.benchmarks.base import (
    OPTION_LETTER,
    SHORT_ANSWER,
    AnswerPair,
    Item,
    Protocol,
    Question,
    grouped,
    mean_score,
)
from mmpipe.benchmarks.jsonl import Document, JsonDict, iter_rows, read_document, require, without_images
from mmpipe.benchmarks.multiple_choice import LETTERS, MultipleChoice, options_block
from mmpipe.benchmarks.readers import BenchmarkFiles, image_bytes
from mmpipe.errors import DataError

_FIELDS = ("id", "question", "options", "answer", "question_type")
_CHOICE = "multiple-choice"
_SEED = 42
_EDGE_MARKS = ",.!?;:'"
_IMAGE = re.compile(r"<image (\d+)>")
_SUBJECT = re.compile(r"[^_]+_(.+?)_\d+")
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# what a named letter looks like, and what its last place is looked up by
_FORMS = (("({})", "({})"), (" {} ", " {} "))
_LOOSE_FORMS = (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} "))
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


class Mmmu(MultipleChoice):
    """MMMU's validation split."""

    name = "mmmu"
    submission = "json"
    files = {"questions": "."}
    listed_by = "id"
    prompts = {
        "llava": "{question}\n{bracketed}{instruction}",
        "llava_open": "{question}{instruction}",
        "lmms": "{question}\n{options}\n{instruction}",
        "lmms_open": "{question}\n{instruction}",
    }
    protocols = (
        Protocol("mmmu_val", "the official parser, random option included", metric="overall", aliases=("llava",)),
        Protocol("norandom", "the official parser; a reply without option is wrong", rule="norandom", metric="overall"),
        Protocol("lmms", "lmms-eval 0.7.3 and LibMoE: 'X ' and 'X.' count as options too", rule="lmms", prompt="lmms",
                 metric="overall", aliases=("libmoe",)),
    )  # fmt: skip

    def questions(self, source: BenchmarkFiles, protocol: Protocol) -> Iterator[Question]:
        for row in _rows(source.path("questions")):
            text = self.text(row, protocol)  # images in the order of their marks
            images = tuple(image_bytes(row.get(f"image_{n}"), f"mmmu, {row['id']}") for n in _IMAGE.findall(text))
            yield Question(id=row["id"], text=_IMAGE.sub("<image>", text), images=images)

    def text(self, record: JsonDict, protocol: Protocol) -> str:
        options, choice = _list_of(record["options"]), record["question_type"] == _CHOICE
        with_options = options if protocol.prompt == "lmms" else choice
        return self.prompts[protocol.prompt if with_options else f"{protocol.prompt}_open"].format(
            question=record["question"],
            options=options_block(options),
            bracketed="".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, options, strict=False)),
            instruction=OPTION_LETTER if choice else SHORT_ANSWER,
        )

    def options(self, reference: JsonDict) -> dict[str, str]:
        """Letters and texts; where the texts are unknown, one that no reply contains."""
        return {letter: text or "\x00" for letter, text in reference["index2ans"].items()}

    def read_references(self, paths: Sequence[Path]) -> list[JsonDict]:
        """Besides files of records, the folder of the subjects."""
        documents = [
            Document(str(path), [without_images(row) for row in _rows(path)]) if path.is_dir() else read_document(path)
            for path in paths
        ]
        return self.parse_references(documents)

    def parse_references(self, documents: Sequence[Document]) -> list[JsonDict]:
        """Records, or the official ``answer_dict_val.json`` (``{id: {question_type, ground_truth}}``)."""
        return [_reference(record) for record in super().parse_references(documents)]

    def item(self, pair: AnswerPair, protocol: Protocol, generator: random.Random | None = None) -> Item:
        """The verdict; ``generator`` draws an option where the reply names none."""
        reference, loose = pair.reference, protocol.rule == "lmms"
        gold, fallback, chosen = reference["answer"], False, None
        if reference["question_type"] == _CHOICE:
            options = self.options(reference)
            chosen = find_option(pair.text, options, loose) if pair.answered else None
            fallback = pair.answered and chosen is None
            if fallback and generator:
                chosen = generator.choice(list(options))
            right = chosen in (gold if isinstance(gold, list) else [gold])
        else:
            # lmms-eval compares with the list as it is written
            chosen, right = pair.text, open_match(pair.text, str(gold) if loose else gold)
        facts = {"subject": reference["subject"], "gold": gold, "random_fallback": fallback}
        return self.result(pair, right, chosen, fallback, **facts)

    def rate(self, pairs: Sequence[AnswerPair], protocol: Protocol) -> tuple[list[Item], JsonDict]:
        generator = random.Random(_SEED) if protocol.rule != "norandom" else None
        items = [self.item(pair, protocol, generator) for pair in pairs]
        subjects = grouped(items, "subject")
        domains = {name: [i for subject in some for i in subjects.get(subject, [])] for name, some in _DOMAINS.items()}
        parsed = [item for item in items if not item.facts["random_fallback"]]
        return items, {
            "overall": mean_score(items),
            "per_subject": {name: mean_score(some) for name, some in subjects.items()},
            "per_domain": {name: mean_score(some) for name, some in domains.items() if some},
            "random_fallbacks": len(items) - len(parsed),
            "accuracy_without_random_fallback_items": mean_score(parsed) if parsed else 0.0,
        }

    def document(self, pairs: Sequence[AnswerPair]) -> JsonDict:
        """The official answer file ``{id: letter or text}``; letters by the parser without random option."""
        return {
            pair.reference["question_id"]: (find_option(pair.text, self.options(pair.reference)) or "")
            if pair.reference["question_type"] == _CHOICE
            else pair.text
            for pair in pairs
        }

    def convert(self, pairs: Sequence[AnswerPair], out: Path) -> JsonDict:
        without = sum(not answer for answer in self.document(pairs).values())
        return super().convert(pairs, out) | {"without_option": without}


def find_option(reply: str, options: Mapping[str, str], loose: bool = False) -> str | None:
    """The letter of the option a reply names, None where it names none.

    In order: letters in brackets; letters between blanks; in replies of more than five words the options'
    texts. Of several the last one in the reply counts. ``loose`` is lmms-eval's form: a letter before a blank
    or a period is enough, but the last one is still looked up between blanks.
    """
    for mark in _EDGE_MARKS:
        reply = reply.strip(mark)
    reply = f" {reply} "
    for form, places in _LOOSE_FORMS if loose else _FORMS:
        named = [letter for letter in options if form.format(letter) in reply]
        if named:
            return max(named, key=lambda letter: reply.rfind(places.format(letter)))
    if len(reply.split()) <= 5:
        return None
    lowered = reply.lower()
    named = [letter for letter, text in options.items() if text.lower() in lowered]
    return max(named, key=lambda letter: lowered.rfind(options[letter].lower()), default=None)


def open_candidates(reply: str) -> list[str | float]:
    """Candidate answers of an open reply: the ends of its lines after words such as "is" and "answer", and their numbers."""
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
    """An open answer as it is compared: numbers rounded to two decimals, other texts in lower case, one character with
    a blank on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_match(reply: str, gold: str | Sequence[str]) -> bool:
    """Whether one of the candidates is a right number or contains a right text."""
    golds = [form for text in ([gold] if isinstance(gold, str) else gold) for form in normal_forms(str(text))]
    said = open_candidates(reply)
    contained = any(a in b for a in golds if isinstance(a, str) for b in said if isinstance(b, str))
    return contained or any(number in golds for number in said if not isinstance(number, str))


def _rows(root: Path) -> Iterator[JsonDict]:
    """Rows of all subjects; of a folder the parquet files of validation, at any depth and also through links."""
    folders = [Path(folder) for folder, _, _ in os.walk(root, followlinks=True)]
    files = sorted(path for folder in folders for path in folder.glob("*validation*.parquet"))
    files = files if root.is_dir() else [root]
    if not files:
        raise DataError(f"{root}: there are no parquet files of the validation split")
    for path in files:
        for row in iter_rows(path):
            require(row, _FIELDS, str(path))
            yield row


def _reference(record: JsonDict) -> JsonDict:
    record = {"answer": record["ground_truth"], **record} if "ground_truth" in record else record
    number = record.get("id", record.get("question_id"))
    require(record, ("question_type", "answer"), f"mmmu, {number}")
    found = _SUBJECT.fullmatch(str(number))
    texts = record.get("index2ans") or dict(zip(LETTERS, _list_of(record.get("options", [])), strict=False))
    letters = record.get("all_choices") or list(texts) or list("ABCD")
    answer, kind = record["answer"], record["question_type"]
    return {
        "question_id": number,
        "question_type": kind,
        "answer": _list_of(answer) if kind != _CHOICE and str(answer).startswith("[") else answer,
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


BENCHMARK = Mmmu()
