"""TextVQA (Singh et al. 2019, arXiv 1904.08920): read the text in the image; ten human answers a question.

Files are the official ``TextVQA_0.5.1_val.json`` (``{"data": [...]}``) and the folder ``train_images``. The
OCR tokens of the prompt come from the records, from the Rosetta file, or with whole prompts from LLaVA's
question file. The table on the hub (role ``parquet``) has the tokens in it. Prompts with and without OCR
tokens differ by ten points or more, so they are different protocols.

LLaVA's answers carry the image's id for the question's; the question is then read from the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from mmpipe.benchmarks.base import (
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
from mmpipe.benchmarks.jsonl import read_document, write_document
from mmpipe.benchmarks.readers import hub_records, images_of, on_hub
from mmpipe.benchmarks.stats import Estimate, estimate_mean
from mmpipe.benchmarks.text import evalai_normal, one_line, soft_accuracy, vqa_normal, vqa_normal_vlmevalkit
from mmpipe.errors import DataError

_OCR = "Reference OCR token: "
_HEADLINES = {"lmms": "exact_match", "vqa": "overall", "vlmevalkit": "Overall"}
_OLD_LAYOUT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


class TextVqa(Benchmark):
    """TextVQA's validation split."""

    name = "textvqa"
    submission = "json"
    files: ClassVar[Mapping[str, str]] = {
        "questions": "TextVQA_0.5.1_val.json",
        "images": "train_images",
        "ocr": "TextVQA_Rosetta_OCR_v0.2_val.json",
        "prompts": "llava_textvqa_val_v051_ocr.jsonl",
        "parquet": "data",
    }
    protocols = (
        Protocol(
            "textvqa_val_ocr", "LLaVA's prompt with OCR tokens, MMF's m4c evaluator", aliases=("llava", "m4c", "ocr")
        ),
        Protocol("textvqa_val", "the same without OCR tokens", prompt="plain"),
        Protocol(
            "lmms", "lmms-eval: no OCR tokens, question capitalised", rule="lmms", prompt="lmms", aliases=("libmoe",)
        ),
        Protocol(
            "vlmevalkit",
            "VLMEvalKit: no OCR tokens, its punctuation rule on both sides",
            rule="vlmevalkit",
            prompt="plain",
            max_new_tokens=2048,
        ),
        Protocol("vqa", "the VQA evaluation, which compares raw where the humans are unanimous", rule="vqa"),
    )

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        prompts = self._prompts(source, protocol)
        records = self.references(source, protocol)
        images = images_of(source, (f"{record['image_id']}.jpg" for record in records))
        for record, image in zip(records, images, strict=True):
            text = prompts.get(_question_key(record)) or _prompt(record, protocol.prompt)
            yield Question(id=record["question_id"], text=text, images=(image,), extra={"image_id": record["image_id"]})

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        if on_hub(source):
            return hub_records(source, ("question_id", "image_id", "question", "answers", "ocr_tokens"))
        records = self.read_references([source.path("questions")])
        if protocol.prompt == "llava" and not source.has("prompts"):
            _add_ocr_tokens(records, source)
        return records

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        lists = [Document(d.name, d.content.get("data")) if isinstance(d.content, dict) else d for d in documents]
        return [dict(record) for record in records_of(lists, ("image_id", "question"))]

    def reference_keys(self, reference: Record) -> list[tuple[str, ...]]:
        by_text = _question_key(reference)
        return [(key(reference["question_id"]),), by_text] if "question_id" in reference else [by_text]

    def answer_keys(self, answer: Record) -> list[tuple[str, ...]]:
        number = key(answer["question_id"])
        question = question_of_prompt(str(answer.get("prompt", "")))
        return [(number,)] if question is None else [(number, question), (number,)]

    def judgement_key(self, reference: Record) -> str:
        return key(reference.get("question_id", reference["image_id"]))

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        items = [_rate(pair, protocol.rule) for pair in pairs]
        mean = fmean(item.score for item in items)
        if protocol.rule == "lmms":
            return items, {"exact_match": mean}
        if protocol.rule == "vqa":
            return items, {"overall": round(100 * mean, 2)}
        if protocol.rule == "vlmevalkit":
            return items, {"Overall": 100 * mean}
        return items, {"accuracy": round(100 * mean, 2), "accuracy_exact": 100 * mean, "samples": len(items)}

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        scale = 1.0 if protocol.rule == "lmms" else 100.0
        metric = _HEADLINES.get(protocol.rule, "accuracy_exact")
        return estimate_mean(metric, [item.score for item in items], [item.unit for item in items], scale)

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """The list EvalAI accepts: ``{"question_id", "answer"}`` with normalised answers."""
        for pair in pairs:
            require(pair.reference, ("question_id",), self.name)
        write_document(
            out, [{"question_id": p.reference["question_id"], "answer": evalai_normal(p.text)} for p in pairs]
        )
        return {}

    def _prompts(self, source: Source, protocol: Protocol) -> dict[tuple[str, ...], str]:
        """LLaVA's prompts by image and question, if its question file is there."""
        if protocol.prompt != "llava" or not source.has("prompts"):
            return {}
        records = records_of([read_document(source.path("prompts"))], ("question_id", "text"))
        return {
            (key(record["question_id"]), question): record["text"]
            for record in records
            if (question := question_of_prompt(record["text"])) is not None
        }


def question_of_prompt(prompt: str) -> str | None:
    """The lower-cased question in one of the prompt layouts that LLaVA's scorer knows; None in any other."""
    if prompt.startswith("OCR tokens: "):
        found = _OLD_LAYOUT.search(prompt)
        return found.group(1).lower() if found else None
    lines = prompt.split("\n")
    if _OCR in prompt and len(lines) == 3:
        return lines[1 if lines[0].startswith(_OCR) else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


def _question_key(record: Record) -> tuple[str, ...]:
    return key(record["image_id"]), str(record["question"]).lower()


def _prompt(record: Record, layout: str) -> str:
    question = str(record["question"])
    if layout == "lmms":
        return question.capitalize() + SHORT_ANSWER
    if layout == "plain":
        return question + SHORT_ANSWER
    return f"{question}\n{_OCR}{', '.join(record['ocr_tokens'])}{SHORT_ANSWER}"


def _add_ocr_tokens(records: Sequence[Record], source: Source) -> None:
    """Give each record its OCR tokens from the Rosetta file, unless it has them."""
    if all("ocr_tokens" in record for record in records):
        return
    document = read_document(source.path("ocr"))
    content = document.content.get("data") if isinstance(document.content, dict) else document.content
    tokens = {
        key(record["image_id"]): record["ocr_tokens"]
        for record in records_of([Document(document.name, content)], ("image_id", "ocr_tokens"))
    }
    for record in records:
        if key(record["image_id"]) not in tokens:
            raise DataError(f"{document.name}: no OCR tokens for the image {record['image_id']}")
        record["ocr_tokens"] = tokens[key(record["image_id"])]


def _rate(pair: Pair, rule: str) -> Item:
    reference = pair.reference
    humans = reference.get("answers")
    if not humans or len(humans) != 10:
        raise DataError(
            f"textvqa: question {reference.get('question_id')} has {len(humans or [])} human answers, not "
            "ten; the test split is scored by EvalAI only: write its submission file with 'convert'"
        )
    parsed, gold = _normalised(pair.text, humans, rule)
    return Item(
        id=reference["question_id"] if "question_id" in reference else reference["image_id"],
        score=soft_accuracy(parsed, gold) if pair.answered else 0.0,
        unit=key(reference["image_id"]),
        parsed=parsed if pair.answered else None,
        answered=pair.answered,
        facts={"question": reference["question"]},
    )


def _normalised(reply: str, humans: Sequence[Any], rule: str) -> tuple[str, list[str]]:
    if rule == "vlmevalkit":
        return vqa_normal_vlmevalkit(one_line(reply)), [vqa_normal_vlmevalkit(one_line(str(h))) for h in humans]
    if rule != "vqa":
        return evalai_normal(reply), [evalai_normal(str(human)) for human in humans]
    reply, gold = one_line(reply), [one_line(str(human)) for human in humans]
    if len(set(gold)) > 1:
        return vqa_normal(reply), [vqa_normal(human) for human in gold]
    return reply, gold


BENCHMARK = TextVqa()
