"""VQA v2 (Goyal et al. 2017, arXiv 1612.00837): questions about COCO images, ten human answers each.

Files are the official question and annotation files of a split and the folder of its images; the questions
may also be LLaVA's (``question_id, image, text`` a line), and the hub has all in one table (role
``parquet``). Annotations of the test splits are not public: their submission goes to EvalAI and must hold
every question of test2015 (role ``submitted``), asked or not.

The published pipeline normalises the replies for upload (EvalAI's answer processor) and scores the upload
with the VQA evaluation, which normalises again only where the ten humans do not all agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import ClassVar

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
from mmpipe.benchmarks.readers import as_llava_asks, hub_images, hub_records, on_hub
from mmpipe.benchmarks.stats import Estimate, estimate_mean
from mmpipe.benchmarks.text import evalai_normal, one_line, soft_accuracy, vqa_normal, vqa_normal_lmms
from mmpipe.errors import DataError

_EXTRAS = ("image_id", "question_type", "answer_type")


class VqaV2(Benchmark):
    """VQA v2, by default the validation split."""

    name = "vqav2"
    submission = "json"
    files: ClassVar[Mapping[str, str]] = {
        "questions": "v2_OpenEnded_mscoco_val2014_questions.json",
        "annotations": "v2_mscoco_val2014_annotations.json",
        "images": "val2014",
        "submitted": "v2_OpenEnded_mscoco_test2015_questions.json",
        "parquet": "data",
    }
    protocols = (
        Protocol("vqav2_val", "the VQA evaluation on answers normalised for upload", aliases=("llava",)),
        Protocol("raw", "the VQA evaluation on the replies as they are", rule="raw"),
        Protocol("lmms", "lmms-eval: both sides always normalised", rule="lmms", max_new_tokens=16),
    )

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        if on_hub(source):
            rows = hub_records(source, ("question_id", "question"))
            for row, image in zip(rows, hub_images(source), strict=True):
                yield Question(id=row["question_id"], text=row["question"] + SHORT_ANSWER, images=(image,))
            return
        records = _questions(read_document(source.path("questions")))
        if any("text" in record for record in records):
            yield from as_llava_asks(source, "questions")
            return
        split = Path(source.files["images"]).name
        for record in records:
            require(record, ("image_id", "question"), str(source.path("questions")))
            yield Question(
                id=record["question_id"],
                text=record["question"] + SHORT_ANSWER,
                images=(source.image(f"COCO_{split}_{int(record['image_id']):012d}.jpg"),),
            )

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        """A test split has no annotations; there the questions of all of test2015 are submitted, asked or not."""
        if on_hub(source):
            rows = hub_records(source, ("question_id", "question", "answers"), _EXTRAS)
            return [_reference(row, row) for row in rows]
        if source.has("annotations"):
            return self.read_references([source.path("questions"), source.path("annotations")])
        references = self.read_references([source.path("questions")])
        if not source.has("submitted"):
            return references
        asked = {key(reference["question_id"]) for reference in references}
        everything = self.read_references([source.path("submitted")])
        return [r if key(r["question_id"]) in asked else {**r, "asked": False} for r in everything]

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        """Question file, annotation file, both, ``{"questions", "annotations"}``, or records.

        With a question file its order and its questions count; an annotation must exist for each or for none.
        """
        questions: list[Record] = []
        annotations: dict[str, Record] = {}
        for document in documents:
            both = document.content if isinstance(document.content, dict) else {}
            if "questions" in both or not both:
                found = _questions(document)
                questions += [record for record in found if "answers" not in record]
                annotations |= {key(r["question_id"]): r for r in found if "answers" in r}
            if "annotations" in both:
                found = records_of([_list(document, "annotations")], ("question_id", "answers"))
                annotations |= {key(record["question_id"]): record for record in found}
        if not questions:
            return [_reference(record, record) for record in annotations.values()]
        lacking = [q["question_id"] for q in questions if key(q["question_id"]) not in annotations]
        if annotations and lacking:
            raise DataError(f"vqav2: {len(lacking)} questions have no annotation, e.g. {lacking[:5]}; another split?")
        return [_reference(question, annotations.get(key(question["question_id"]), {})) for question in questions]

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        items = [_rate(pair, _RULES[protocol.rule]) for pair in pairs]
        if protocol.rule == "lmms":
            return items, {"exact_match": fmean(item.score for item in items)}
        return items, {
            "overall": _percent([item.score for item in items]),
            "perAnswerType": _by(items, "answer_type"),
            "perQuestionType": _by(items, "question_type"),
        }

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        scores, units = [item.score for item in items], [item.unit for item in items]
        if protocol.rule == "lmms":
            return estimate_mean("exact_match", scores, units)
        return estimate_mean("overall", scores, units, 100)

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """The list EvalAI accepts: every question, normalised; a question without answer has the empty
        one."""
        write_document(
            out, [{"question_id": p.reference["question_id"], "answer": evalai_normal(p.text)} for p in pairs]
        )
        return {}


def _questions(document: Document) -> list[Record]:
    return records_of([_list(document, "questions")], ("question_id",))


def _list(document: Document, name: str) -> Document:
    content = document.content
    return Document(document.name, content.get(name)) if isinstance(content, dict) else document


def _reference(question: Record, annotation: Record) -> Record:
    """A flat record: what was asked, and the human answers as plain strings (None where they are not
    public)."""
    answers = annotation.get("answers")
    return {
        **({"asked": False} if question.get("asked") is False else {}),
        "question_id": question["question_id"],
        "image_id": question.get("image_id", annotation.get("image_id")),
        "question_type": annotation.get("question_type"),
        "answer_type": annotation.get("answer_type"),
        "answers": answers and [one_line(a["answer"] if isinstance(a, dict) else a) for a in answers],
    }


def _official(reply: str, humans: Sequence[str]) -> tuple[str, Sequence[str]]:
    reply = one_line(reply)
    if len(set(humans)) > 1:
        return vqa_normal(reply), [vqa_normal(human) for human in humans]
    return reply, humans


def _uploaded(reply: str, humans: Sequence[str]) -> tuple[str, Sequence[str]]:
    return _official(evalai_normal(reply), humans)


def _lmms(reply: str, humans: Sequence[str]) -> tuple[str, Sequence[str]]:
    return vqa_normal_lmms(one_line(reply)), [vqa_normal_lmms(human) for human in humans]


_RULES: Mapping[str, Callable[[str, Sequence[str]], tuple[str, Sequence[str]]]] = {
    "official": _uploaded,
    "raw": _official,
    "lmms": _lmms,
}


def _rate(pair: Pair, rule: Callable[[str, Sequence[str]], tuple[str, Sequence[str]]]) -> Item:
    reference = pair.reference
    if not reference["answers"]:
        raise DataError(
            f"vqav2: question {reference['question_id']} has no human answers; the test splits are scored by EvalAI: "
            "write the submission file with 'convert'"
        )
    parsed, humans = rule(pair.text, reference["answers"])
    return Item(
        id=reference["question_id"],
        score=soft_accuracy(parsed, humans) if pair.answered else 0.0,
        unit=key(reference["image_id"] if reference["image_id"] is not None else reference["question_id"]),
        parsed=parsed if pair.answered else None,
        answered=pair.answered,
        facts={"answer_type": reference["answer_type"], "question_type": reference["question_type"]},
    )


def _by(items: Sequence[Item], label: str) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for item in items:
        if item.facts[label] is not None:
            groups.setdefault(str(item.facts[label]), []).append(item.score)
    return {name: _percent(groups[name]) for name in sorted(groups)}


def _percent(scores: Sequence[float]) -> float:
    return round(100 * fmean(scores), 2)


BENCHMARK = VqaV2()
