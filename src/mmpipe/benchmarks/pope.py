"""POPE (Li et al. 2023, arXiv 2305.10355): is the object in the image? Yes or no, in three ways of asking.

Files are the official ``coco_pope_{adversarial,popular,random}.json`` (JSON lines of ``question_id, image,
text, label``), each numbered from 1, with the images of COCO's val2014. Across the three, questions get
LLaVA's numbers: adversarial as they are, random from 10,000,001, popular from 20,000,001. LLaVA's own
question file may stand beside the labels (role ``prompts``); then the k-th question of a category belongs to
the k-th label, as in its scorer. The hub has all in one table (role ``parquet``). Versions differ: ``random``
had 2910 questions when LLaVA was measured and has 3000 today.

The official number is the mean F1 of the three categories, "yes" being positive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any, ClassVar

from mmpipe.artifacts.files import write_jsonl
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
)
from mmpipe.benchmarks.jsonl import read_document
from mmpipe.benchmarks.readers import as_llava_asks, hub_records, images_of, on_hub
from mmpipe.benchmarks.stats import Estimate, bootstrap, estimate_mean
from mmpipe.benchmarks.yesno import NO, OTHER, YES, equal_lmms, llava_pope, yes_or_no_word
from mmpipe.errors import DataError

_FIRST_ID = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
_RULES: Mapping[str, Callable[[str], str]] = {"official": llava_pope, "lmms": equal_lmms, "vlmevalkit": yes_or_no_word}


class Pope(Benchmark):
    """POPE on COCO."""

    name = "pope"
    files: ClassVar[Mapping[str, str]] = {
        **{category: f"coco/coco_pope_{category}.json" for category in _FIRST_ID},
        "images": "val2014",
        "prompts": "llava_pope_test.jsonl",
        "parquet": "data",
    }
    protocols = (
        Protocol("llava", "LLaVA's eval_pope: a reply without a word of denial is a yes"),
        Protocol(
            "lmms", "lmms-eval: the reply must be yes or no, anything else is wrong", rule="lmms", aliases=("libmoe",)
        ),
        Protocol("vlmevalkit", "VLMEvalKit: the word yes or no, not both; all else is wrong", rule="vlmevalkit"),
    )

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        if source.has("prompts"):
            yield from as_llava_asks(source)
            return
        records = self.references(source, protocol)
        images = images_of(source, (record["image"] for record in records))
        for record, image in zip(records, images, strict=True):
            yield Question(
                id=record["question_id"],
                text=record["text"].strip() + SHORT_ANSWER,
                images=(image,),
                extra={"category": record["category"]},
            )

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        if on_hub(source):
            rows = hub_records(source, ("question_id", "question", "answer", "category"), ("image_source",))
            return _as_in_table(rows)
        files = [*_FIRST_ID, *(["prompts"] if source.has("prompts") else [])]
        return self.parse_references([read_document(source.path(role)) for role in files])

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        """Label files by name, records with a category, ``{category: [...]}``, or ``{"questions", "labels"}``; a list
        without labels is LLaVA's question file."""
        questions: list[Record] = []
        by_category: dict[str, list[Record]] = {}
        for document in documents:
            content = document.content
            if isinstance(content, dict) and "questions" in content:
                questions += records_of([Document(document.name, content["questions"])])
                content = content.get("labels", content.get("annotations"))
            elif isinstance(content, list) and content and not any(map(_has_label, content)):
                questions += records_of([document], ("question_id", "category"))
                continue
            for category, records in _categories(Document(document.name, content)).items():
                by_category.setdefault(category, []).extend(records)
        if not any(by_category.values()):
            raise DataError("pope: there are no labels among the references")
        if questions:
            return _numbered_as(questions, by_category)
        return _numbered(by_category)

    def reference_keys(self, reference: Record) -> list[tuple[str, ...]]:
        return [(key(reference["question_id"]),), (reference["category"], key(reference["label_id"]))]

    def answer_keys(self, answer: Record) -> list[tuple[str, ...]]:
        number = key(answer["question_id"])
        return [(str(answer.get("category")), number), (number,)]

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        items = [_rate(pair, _RULES[protocol.rule]) for pair in pairs]
        categories: dict[str, list[Item]] = {}
        for item in items:
            categories.setdefault(item.facts["category"], []).append(item)
        if protocol.rule == "lmms":
            return items, _lmms(items)
        if protocol.rule == "vlmevalkit":
            return items, {name: _vlmevalkit(some) for name, some in {"Overall": items, **categories}.items()}
        report = {category: _ratios(_confusion(members)) for category, members in categories.items()}
        mean = {f"mean_{name}": fmean(values[name] for values in report.values()) for name in ("f1", "accuracy")}
        return items, {**report, **mean}

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        """Mean F1 over the categories (lmms-eval: accuracy; VLMEvalKit: F1 of all), resampled by image."""
        if protocol.rule == "lmms":
            return estimate_mean("pope_accuracy", [i.score for i in items], [i.unit for i in items])
        if protocol.rule == "vlmevalkit":
            return _overall_f1(items, metrics["Overall"]["Overall"])
        names = sorted({item.facts["category"] for item in items})
        totals: dict[str, list[float]] = {}
        for item in items:
            row = totals.setdefault(item.unit, [0.0] * (3 * len(names)))
            first = 3 * names.index(item.facts["category"])
            for offset, count in enumerate(_confusion([item])[:3]):
                row[first + offset] += count

        def mean_f1(sums: Any) -> Any:
            tp, fp, fn = (sums[..., offset::3] for offset in range(3))
            return (2 * tp / (2 * tp + fp + fn)).mean(axis=-1)

        return bootstrap("mean_f1", totals, mean_f1, metrics["mean_f1"])

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """One line a question for the official ``evaluate.py``: ``{"question", "answer"}``."""
        write_jsonl(out, ({"question": p.reference.get("text", ""), "answer": p.text} for p in pairs))
        return {}


def _has_label(record: Any) -> bool:
    return isinstance(record, dict) and not {"label", "answer"}.isdisjoint(record)


def _as_in_table(rows: Sequence[Record]) -> list[Record]:
    """References in the order of the hub's table, numbered as always."""
    by_category: dict[str, list[Record]] = {}
    for row in rows:
        by_category.setdefault(str(row["category"]), []).append(row)
    waiting: dict[str, deque[Record]] = {}
    for reference in _numbered(by_category):
        waiting.setdefault(reference["category"], deque()).append(reference)
    return [waiting[str(row["category"])].popleft() for row in rows]


def _categories(document: Document) -> dict[str, list[Record]]:
    if isinstance(document.content, dict):
        return {
            category: records_of([Document(f"{document.name}: {category}", records)], ("question_id",))
            for category, records in document.content.items()
        }
    found: dict[str, list[Record]] = {}
    stem = PurePosixPath(document.name).stem
    for record in records_of([document], ("question_id",)):
        category = record.get("category") or next((name for name in _FIRST_ID if stem.endswith(name)), None)
        if category is None:
            raise DataError(
                f"{document.name}: a label has no 'category', nor does the file's name (coco_pope_<category>.json)"
            )
        found.setdefault(str(category), []).append(record)
    return found


def _numbered(by_category: Mapping[str, Sequence[Record]]) -> list[Record]:
    """Reference records; numbers that several categories use are moved to LLaVA's ranges."""
    ids = [key(record.get("question_id")) for records in by_category.values() for record in records]
    shared = len(set(ids)) < len(ids)
    return [
        _reference(record, category, _moved(record["question_id"], category) if shared else record["question_id"])
        for category, records in by_category.items()
        for record in records
    ]


def _moved(number: Any, category: str) -> int | str:
    if category not in _FIRST_ID or not key(number).isdecimal():
        return f"{category}/{number}"
    first = _FIRST_ID[category]
    return int(key(number)) + (first if int(key(number)) <= first else 0)


def _numbered_as(questions: Sequence[Record], by_category: Mapping[str, Sequence[Record]]) -> list[Record]:
    """Reference records numbered by the question file, the k-th of a category being the k-th label."""
    references = []
    for category, labels in by_category.items():
        asked = [question for question in questions if question.get("category") == category]
        if len(asked) != len(labels):
            raise DataError(f"pope: {len(asked)} questions but {len(labels)} labels of '{category}'; another version?")
        for question, label in zip(asked, labels, strict=True):
            if len({record["image"] for record in (question, label) if "image" in record}) > 1:
                raise DataError(f"pope: question {question['question_id']} and its label show different images")
            references.append(_reference(label, category, question["question_id"]))
    return references


def _reference(record: Record, category: str, number: Any) -> Record:
    label = str(record.get("label", record.get("answer", ""))).strip().lower()
    if label not in (YES, NO):
        raise DataError(f"pope, {category}: the label of question {record['question_id']} is {label!r}, not yes or no")
    return {
        "question_id": number,
        "label_id": record.get("label_id", record["question_id"]),
        "category": category,
        "image": record.get("image", record.get("image_source")),
        "text": record.get("text", record.get("question", "")),
        "label": label,
    }


def _rate(pair: Pair, rule: Callable[[str], str]) -> Item:
    reference = pair.reference
    parsed = rule(pair.text) if pair.answered else None
    return Item(
        id=reference["question_id"],
        score=float(parsed == reference["label"]),
        unit=str(reference["image"] or reference["question_id"]),
        parsed=parsed,
        answered=pair.answered,
        unparsed=parsed == OTHER,
        facts={"category": reference["category"], "gold": reference["label"]},
    )


def _confusion(items: Sequence[Item]) -> tuple[int, int, int, int]:
    """True positives, false positives, false negatives, true negatives; a missing answer is the wrong one."""
    tp = sum(item.facts["gold"] == YES and item.score == 1 for item in items)
    fn = sum(item.facts["gold"] == YES and item.score == 0 for item in items)
    tn = sum(item.facts["gold"] == NO and item.score == 1 for item in items)
    fp = sum(item.facts["gold"] == NO and item.score == 0 for item in items)
    return tp, fp, fn, tn


def _ratios(confusion: tuple[int, int, int, int]) -> Record:
    tp, fp, fn, tn = confusion
    total = tp + fp + fn + tn
    return {
        "accuracy": (tp + tn) / total,
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "yes_ratio": (tp + fp) / total,
    }


def _lmms(items: Sequence[Item]) -> Record:
    """lmms-eval's figures; only replies of a plain yes or no enter precision and recall, and its "yes ratio"
    is the one of the labels."""
    tp = sum(item.parsed == YES and item.facts["gold"] == YES for item in items)
    fp = sum(item.parsed == YES and item.facts["gold"] == NO for item in items)
    fn = sum(item.parsed == NO and item.facts["gold"] == YES for item in items)
    return {
        "pope_accuracy": fmean(item.score for item in items),
        "pope_precision": _ratio(tp, tp + fp),
        "pope_recall": _ratio(tp, tp + fn),
        "pope_f1_score": _ratio(2 * tp, 2 * tp + fp + fn),
        "pope_yes_ratio": fmean(item.facts["gold"] == YES for item in items),
    }


def _vlmevalkit(items: Sequence[Item]) -> Record:
    """VLMEvalKit's row in percent; ``Overall`` is F1, and a reply that is neither yes nor no counts as no there."""
    tp = sum(item.parsed == YES and item.facts["gold"] == YES for item in items)
    said, true = sum(item.parsed == YES for item in items), sum(item.facts["gold"] == YES for item in items)
    return {
        "Overall": 100 * _ratio(2 * tp, said + true),
        "acc": 100 * fmean(item.score for item in items),
        "precision": 100 * _ratio(tp, said),
        "recall": 100 * _ratio(tp, true),
    }


def _overall_f1(items: Sequence[Item], value: float) -> Estimate:
    totals: dict[str, list[float]] = {}
    for item in items:
        row = totals.setdefault(item.unit, [0.0, 0.0])
        row[0] += item.parsed == YES and item.facts["gold"] == YES
        row[1] += (item.parsed == YES) + (item.facts["gold"] == YES)
    return bootstrap("Overall", totals, lambda t: 200 * t[..., 0] / t[..., 1], value)


def _ratio(part: float, whole: float) -> float:
    """0 where there is nothing to divide by; the official script stops there."""
    return part / whole if whole else 0.0


BENCHMARK = Pope()
