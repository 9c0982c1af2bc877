"""ScienceQA (Lu et al. 2022, arXiv 2209.09513): school science with two to five options, half with an image.

Files are the official ``problems.json`` and ``pid_splits.json`` (the test split), the images below
``test/<id>/``, and LLaVA's ``llava_test_CQM-A.json`` if its prompts are wanted word for word; or a table of
the hub (role ``parquet``), which has no ids, so that questions are numbered by place. A question without
image is asked as text.

LLaVA counts a question as one with an image when ``<image>`` stands in the *answer's* prompt; so a question
without answer is wrong, and not counted among those with an image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    numbered,
    records_of,
    require,
)
from mmpipe.benchmarks.choices import LETTERS, options_block
from mmpipe.benchmarks.jsonl import read_document, write_document
from mmpipe.benchmarks.readers import hub_images_if_any, hub_records, on_hub
from mmpipe.benchmarks.stats import Estimate, estimate_mean
from mmpipe.errors import DataError

_MARK = "<image>"
_OPTIONS = "ABCDE"
_FAILED = "FAILED"
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")  # any character may follow, as in the original


def letter_llava(reply: str) -> str | None:
    """LLaVA's rule: a letter alone, "X. ...", or a single "The answer is X" followed by anything."""
    if reply in tuple(_OPTIONS):
        return reply
    if len(reply) >= 3 and reply[0] in _OPTIONS and reply[1:3] == ". ":
        return reply[0]
    found = _ANSWER_IS.findall(reply)
    return found[0] if len(found) == 1 else None


def letter_lmms(reply: str) -> str | None:
    """lmms-eval's rule: a letter in either case, or "X." at the beginning."""
    reply = reply.strip()
    if len(reply) == 1:
        return reply.upper()
    return reply[0] if len(reply) >= 2 and reply[0].isupper() and reply[0].isascii() and reply[1] == "." else None


def letter_libmoe(reply: str) -> str | None:
    """The same in LibMoE's copy of lmms-eval: capital letters only."""
    letter = letter_lmms(reply)
    return letter if letter is None or letter == reply.strip()[0] else None


_RULES: Mapping[str, Callable[[str], str | None]] = {
    "official": letter_llava,
    "lmms": letter_lmms,
    "libmoe": letter_libmoe,
}


class ScienceQa(Benchmark):
    """ScienceQA's test split."""

    name = "scienceqa"
    submission = "json"
    files: ClassVar[Mapping[str, str]] = {
        "questions": "problems.json",
        "splits": "pid_splits.json",
        "images": "test",
        "prompts": "llava_test_CQM-A.json",
        "parquet": "ScienceQA-FULL",
    }
    protocols = (
        Protocol("llava", "LLaVA's eval_science_qa", max_new_tokens=1024),
        Protocol("lmms", "lmms-eval: a letter in either case", rule="lmms", prompt="lmms", max_new_tokens=16),
        Protocol(
            "libmoe", "LibMoE's copy of it: capital letters only", rule="libmoe", prompt="lmms", max_new_tokens=16
        ),
    )

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        prompts = self._prompts(source, protocol)
        records = self.references(source, protocol)
        images: Iterator[bytes | Path | None] = (
            hub_images_if_any(source) if on_hub(source) else (_image(source, record) for record in records)
        )
        for record, image in zip(records, images, strict=True):
            text = prompts.get(key(record["question_id"])) or _prompt(record, protocol.prompt)
            if image is None:
                yield Question(id=record["question_id"], text=text)
            else:
                yield Question(id=record["question_id"], text=f"{_MARK}\n{text}", images=(image,))

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        if on_hub(source):
            return numbered(hub_records(source, ("question", "choices", "answer"), ("hint", "subject", "grade")))
        return self.read_references([source.path("questions"), source.path("splits")])

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        """``problems.json`` with ``pid_splits.json`` (or ``{"problems", "test" or "test_ids"}``), or
        records."""
        problems: dict[str, Record] = {}
        wanted: list[Any] | None = None
        records: list[Record] = []
        for document in documents:
            content = document.content
            if isinstance(content, list):
                records += numbered(records_of([document], ("choices", "answer")))
                continue
            if not isinstance(content, dict):
                raise DataError(f"{document.name}: neither problems, splits nor records")
            ids = next((content[name] for name in ("test", "test_ids", "split") if name in content), None)
            wanted = wanted if ids is None else (ids["test"] if isinstance(ids, dict) else ids)
            problems |= content.get("problems", {} if ids is not None else content)
        if problems and wanted is None:
            wanted = [number for number, problem in problems.items() if problem.get("split", "test") == "test"]
        absent = [number for number in wanted or [] if key(number) not in problems]
        if absent:
            raise DataError(f"scienceqa: the problems lack the ids {absent[:5]} of the split")
        for number in wanted or []:
            require(problems[key(number)], ("choices", "answer"), f"scienceqa, problem {number}")
            records.append({"question_id": number, **problems[key(number)]})
        return records

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        rule = _RULES[protocol.rule]
        items = [_rate(pair, rule) for pair in pairs]
        correct = int(sum(item.score for item in items))
        if protocol.rule != "official":
            return items, {"exact_match": fmean(item.score for item in items), "n": len(items)}
        imaged = [item.score for item in items if item.facts["is_multimodal"]]
        return items, {
            "accuracy": 100 * correct / len(items),
            "correct": correct,
            "count": len(items),
            "img_accuracy": 100 * fmean(imaged) if imaged else 0.0,
            "img_count": len(imaged),
        }

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        """The questions with an image (SQA-IMG); all by lmms-eval's rule."""
        if protocol.rule != "official":
            return estimate_mean("exact_match", [i.score for i in items], [i.unit for i in items])
        imaged = [item for item in items if item.facts["is_multimodal"]]
        if imaged:
            return estimate_mean("img_accuracy", [i.score for i in imaged], [i.unit for i in imaged], 100)
        return estimate_mean("accuracy", [i.score for i in items], [i.unit for i in items], 100)

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """LLaVA's result file: ``acc``, ``correct``, ``count``, ``results`` (option numbers) and
        ``outputs``."""
        items = [_rate(pair, letter_llava) for pair in pairs]
        correct = int(sum(item.score for item in items))
        write_document(
            out,
            {
                "acc": 100 * correct / len(items),
                "correct": correct,
                "count": len(items),
                "results": {key(item.id): item.facts["predicted_index"] for item in items},
                "outputs": {
                    key(item.id): pair.text if pair.answered else _FAILED
                    for item, pair in zip(items, pairs, strict=True)
                },
            },
            indent=2,
        )
        return {}

    def _prompts(self, source: Source, protocol: Protocol) -> dict[str, str]:
        """LLaVA's prompts by question id, without the image mark, if its question file is there."""
        if protocol.prompt != "llava" or not source.has("prompts"):
            return {}
        records = records_of([read_document(source.path("prompts"))], ("id", "conversations"))
        texts = {key(r["id"]): str(r["conversations"][0]["value"]) for r in records}
        return {number: text.replace(_MARK, "").strip() + OPTION_LETTER for number, text in texts.items()}


def _image(source: Source, record: Record) -> Path | None:
    name = record.get("image")
    return source.image(f"{key(record['question_id'])}/{name}") if name else None


def _prompt(record: Record, layout: str) -> str:
    context = f"Context: {record['hint']}\n" if record.get("hint") else ""
    return f"{context}{record['question']}\n{options_block(record['choices'])}{OPTION_LETTER}"


def _rate(pair: Pair, rule: Callable[[str], str | None]) -> Item:
    reference = pair.reference
    letter = rule(pair.text) if pair.answered else None
    place = _OPTIONS.find(letter) if letter else -1
    chosen = place if 0 <= place < len(reference["choices"]) else -1
    gold = int(reference["answer"])
    return Item(
        id=reference["question_id"],
        score=float(chosen == gold),
        unit=key(reference["question_id"]),
        parsed=letter,
        answered=pair.answered,
        unparsed=pair.answered and letter is None,
        facts={
            "predicted_index": chosen,
            "gold": LETTERS[gold],
            "is_multimodal": pair.answer is not None and _MARK in str(pair.answer.get("prompt", "")),
        },
    )


BENCHMARK = ScienceQa()
