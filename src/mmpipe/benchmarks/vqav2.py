"""VQA v2 (Goyal et al. 2017, arXiv 1612.00837): questions about COCO images, ten human answers each.

Files are the official question and annotation files of a split and the folder of its images; the questions may also be
LLaVA's (``question_id, image, text`` a line), and the hub has all in one table (role ``parquet``). Annotations of the
test splits are not public: their submission goes to EvalAI and must hold every question of test2015 (role
``submitted``), asked or not.

The published pipeline normalises the replies for upload (EvalAI's answer processor) and scores the upload with the VQA
evaluation (GT-Vision-Lab/VQA, ``vqaEval.py``), which normalises again only where the ten humans do not all agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mmpipe.benchmarks.base import AnswerPair, Item, Protocol, Question, grouped, mean_score
from mmpipe.benchmarks.jsonl import Document, JsonDict, key, read_document, records_of, require
from mmpipe.benchmarks.readers import BenchmarkFiles
from mmpipe.benchmarks.short_answer import HumanAnswers, one_line
from mmpipe.errors import DataError


class VqaV2(HumanAnswers):
    """VQA v2, by default the validation split."""

    name = "vqav2"
    files = {
        "questions": "v2_OpenEnded_mscoco_val2014_questions.json",
        "annotations": "v2_mscoco_val2014_annotations.json",
        "images": "val2014",
        "submitted": "v2_OpenEnded_mscoco_test2015_questions.json",
        "parquet": "data",
    }
    hub_columns = ("question_id", "question", "answers")
    hub_optional = ("image_id", "question_type", "answer_type")
    shown = ("answer_type", "question_type")
    unit_field = "image_id"
    protocols = (
        Protocol("vqav2_val", "the VQA evaluation on answers normalised for upload", rule="vqa_uploaded",
                 metric="overall", scale=100, aliases=("llava",)),
        Protocol("raw", "the VQA evaluation on the replies as they are", rule="vqa", metric="overall", scale=100),
        Protocol("lmms", "lmms-eval: both sides always normalised", rule="lmms", metric="exact_match",
                 max_new_tokens=16),
    )  # fmt: skip

    def questions(self, source: BenchmarkFiles, protocol: Protocol) -> Iterator[Question]:
        if source.on_hub:
            records = source.hub_rows(("question_id", "question"))
        else:
            records = _questions(read_document(source.path("questions")))
            if any("text" in record for record in records):
                yield from self.llava_questions(source, protocol, "questions")
                return
            for record in records:
                require(record, ("image_id", "question"), str(source.path("questions")))
        yield from self.ask(source, protocol, records, (self.text(record, protocol) for record in records))

    def images(self, source: BenchmarkFiles, records: Sequence[JsonDict]) -> Iterator[bytes | Path | None]:
        if source.on_hub:
            return source.hub_images()
        split = Path(source.files["images"]).name
        return (source.image(f"COCO_{split}_{int(record['image_id']):012d}.jpg") for record in records)

    def references(self, source: BenchmarkFiles, protocol: Protocol) -> list[JsonDict]:
        """A test split has no annotations; there the questions of all of test2015 are submitted, asked or not."""
        if source.on_hub:
            return super().references(source, protocol)
        if source.has("annotations"):
            return self.read_references([source.path("questions"), source.path("annotations")])
        references = self.read_references([source.path("questions")])
        if not source.has("submitted"):
            return references
        asked = {key(reference["question_id"]) for reference in references}
        everything = self.read_references([source.path("submitted")])
        return [r if key(r["question_id"]) in asked else {**r, "asked": False} for r in everything]

    def parse_references(self, documents: Sequence[Document]) -> list[JsonDict]:
        """Question file, annotation file, both, ``{"questions", "annotations"}``, or records.

        With a question file its order and its questions count; an annotation must exist for each or for none.
        """
        questions: list[JsonDict] = []
        annotations: dict[str, JsonDict] = {}
        for document in documents:
            both = document.content if isinstance(document.content, dict) else {}
            if "questions" in both or not both:
                found = _questions(document)
                questions += [record for record in found if "answers" not in record]
                annotations |= {key(r["question_id"]): r for r in found if "answers" in r}
            if "annotations" in both:
                found = records_of([Document(document.name, both["annotations"])], ("question_id", "answers"))
                annotations |= {key(record["question_id"]): record for record in found}
        if not questions:
            return [_reference(record, record) for record in annotations.values()]
        lacking = [q["question_id"] for q in questions if key(q["question_id"]) not in annotations]
        if annotations and lacking:
            raise DataError(f"vqav2: {len(lacking)} questions have no annotation, e.g. {lacking[:5]}; another split?")
        return [_reference(question, annotations.get(key(question["question_id"]), {})) for question in questions]

    def metrics(self, items: Sequence[Item], pairs: Sequence[AnswerPair], protocol: Protocol) -> JsonDict:
        if protocol.metric != "overall":
            return super().metrics(items, pairs, protocol)
        metrics: JsonDict = {"overall": _percent(items)}
        for name, fact in (("perAnswerType", "answer_type"), ("perQuestionType", "question_type")):
            metrics[name] = {kind: _percent(some) for kind, some in sorted(grouped(items, fact).items())}
        return metrics


def _questions(document: Document) -> list[JsonDict]:
    content = document.content
    questions = content.get("questions") if isinstance(content, dict) else content
    return records_of([Document(document.name, questions)], ("question_id",))


def _reference(question: JsonDict, annotation: JsonDict) -> JsonDict:
    """A flat record: what was asked, and the human answers as plain strings (None where they are not public)."""
    answers = annotation.get("answers")
    return {
        **({"asked": False} if question.get("asked") is False else {}),
        "question_id": question["question_id"],
        "image_id": question.get("image_id", annotation.get("image_id")),
        "question_type": annotation.get("question_type"),
        "answer_type": annotation.get("answer_type"),
        "answers": answers and [one_line(a["answer"] if isinstance(a, dict) else a) for a in answers],
    }


def _percent(items: Sequence[Item]) -> float:
    return round(100 * mean_score(items), 2)


BENCHMARK = VqaV2()
