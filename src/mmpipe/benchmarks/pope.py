"""POPE (Li et al. 2023, arXiv 2305.10355): yes/no questions about the presence of objects, in three categories.

Files are the official ``coco_pope_{adversarial,popular,random}.json`` (JSON lines of ``question_id, image, text,
label``), each numbered from 1, with the images of COCO's val2014. Across the three, questions get LLaVA's numbers:
adversarial as they are, random from 10,000,001, popular from 20,000,001. LLaVA's own question file may be beside the
labels (role ``prompts``); then the k-th question of a category belongs to the k-th label, as in its scorer
(``eval_pope.py``). The hub has all in one table (role ``parquet``). Versions differ: ``random`` had 2910 questions when
LLaVA was measured and has 3000 today.

The official number is the mean F1 of the three categories, "yes" being positive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from statistics import fmean
from typing import Any

from mmpipe.benchmarks.base import SHORT_ANSWER, AnswerPair, Item, Protocol, grouped, mean_score
from mmpipe.benchmarks.jsonl import Document, JsonDict, key, records_of
from mmpipe.benchmarks.readers import BenchmarkFiles
from mmpipe.benchmarks.stats import MetricEstimate, bootstrap_groups
from mmpipe.benchmarks.yes_no import NO, YES, YesNo, equal_lmms, llava_pope, yes_or_no_word
from mmpipe.errors import DataError

_FIRST_ID = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}


class Pope(YesNo):
    """POPE on COCO."""

    name = "pope"
    files = {
        **{category: f"coco/coco_pope_{category}.json" for category in _FIRST_ID},
        "images": "val2014",
        "prompts": "llava_pope_test.jsonl",
        "parquet": "data",
    }
    reference_roles = tuple(_FIRST_ID)
    optional_roles = ("prompts",)
    hub_columns = ("question_id", "question", "answer", "category")
    hub_optional = ("image_source",)
    unit_field = "image"
    prompts = {"llava": "{stripped}" + SHORT_ANSWER}
    rules = {"official": llava_pope, "lmms": equal_lmms, "vlmevalkit": yes_or_no_word}
    protocols = (
        Protocol("llava", "LLaVA's eval_pope: a reply without a word of denial is a yes", metric="mean_f1"),
        Protocol("lmms", "lmms-eval: the reply must be yes or no, anything else is wrong", rule="lmms",
                 metric="pope_accuracy", aliases=("libmoe",)),
        Protocol("vlmevalkit", "VLMEvalKit: the word yes or no, not both; all else is wrong", rule="vlmevalkit",
                 metric="Overall"),
    )  # fmt: skip

    def references(self, source: BenchmarkFiles, protocol: Protocol) -> list[JsonDict]:
        if source.on_hub:
            return _as_in_table(source.hub_rows(self.hub_columns, self.hub_optional))
        return super().references(source, protocol)

    def parse_references(self, documents: Sequence[Document]) -> list[JsonDict]:
        """Label files by name, records with a category, ``{category: [...]}``, or ``{"questions", "labels"}``; a list
        without labels is LLaVA's question file."""
        questions: list[JsonDict] = []
        by_category: dict[str, list[JsonDict]] = {}
        for document in documents:
            content = document.content
            if isinstance(content, dict) and "questions" in content:
                questions += records_of([Document(document.name, content["questions"])])
                content = content.get("labels", content.get("annotations"))
            elif content and isinstance(content, list) and all(set(r).isdisjoint(("label", "answer")) for r in content):
                questions += records_of([document], ("question_id", "category"))
                continue
            for category, records in _categories(Document(document.name, content)).items():
                by_category.setdefault(category, []).extend(records)
        if not any(by_category.values()):
            raise DataError("pope: there are no labels among the references")
        return _numbered_as(questions, by_category) if questions else _numbered(by_category)

    def reference_keys(self, reference: JsonDict) -> list[tuple[str, ...]]:
        return [(key(reference["question_id"]),), (reference["category"], key(reference["label_id"]))]

    def answer_keys(self, answer: JsonDict) -> list[tuple[str, ...]]:
        number = key(answer["question_id"])
        return [(str(answer.get("category")), number), (number,)]

    def variables(self, record: JsonDict) -> JsonDict:
        return {**record, "stripped": record["text"].strip()}

    def gold(self, reference: JsonDict) -> str:
        return str(reference["label"])

    def metrics(self, items: Sequence[Item], pairs: Sequence[AnswerPair], protocol: Protocol) -> JsonDict:
        categories = grouped(items, "category")
        if protocol.rule == "lmms":
            return _lmms(items)
        if protocol.rule == "vlmevalkit":
            return {name: _vlmevalkit(some) for name, some in {"Overall": items, **categories}.items()}
        report = {category: _ratios(members) for category, members in categories.items()}
        mean = {f"mean_{name}": fmean(values[name] for values in report.values()) for name in ("f1", "accuracy")}
        return {**report, **mean}

    def estimate(self, items: Sequence[Item], metrics: JsonDict, protocol: Protocol) -> MetricEstimate:
        """Mean F1 over the categories (lmms-eval: accuracy; VLMEvalKit: F1 of all), resampled by image."""
        if protocol.rule == "lmms":
            return super().estimate(items, metrics, protocol)
        if protocol.rule == "vlmevalkit":
            counts = [(item.unit, "", _counts([item])) for item in items]
            value = metrics["Overall"]["Overall"]
            return bootstrap_groups(
                "Overall", [""], counts, lambda t: 200 * t[..., 0, 0] / (t[..., 0, 1] + t[..., 0, 2]), value
            )

        def mean_f1(sums: Any) -> Any:
            tp, fp, fn = (sums[..., place] for place in range(3))
            return (2 * tp / (2 * tp + fp + fn)).mean(axis=-1)

        counts = [(item.unit, item.facts["category"], _confusion([item])[:3]) for item in items]
        return bootstrap_groups("mean_f1", sorted(grouped(items, "category")), counts, mean_f1, metrics["mean_f1"])

    def submitted(self, pair: AnswerPair) -> JsonDict:
        """A line for the official ``evaluate.py``."""
        return {"question": pair.reference.get("text", ""), "answer": pair.text}


def _as_in_table(rows: Sequence[JsonDict]) -> list[JsonDict]:
    """References in the order of the hub's table, numbered as always."""
    by_category: dict[str, list[JsonDict]] = {}
    for row in rows:
        by_category.setdefault(str(row["category"]), []).append(row)
    in_order = [id(row) for members in by_category.values() for row in members]
    references = dict(zip(in_order, _numbered(by_category), strict=True))
    return [references[id(row)] for row in rows]


def _categories(document: Document) -> dict[str, list[JsonDict]]:
    if isinstance(document.content, dict):
        return {
            category: records_of([Document(f"{document.name}: {category}", records)], ("question_id",))
            for category, records in document.content.items()
        }
    found: dict[str, list[JsonDict]] = {}
    stem = PurePosixPath(document.name).stem
    for record in records_of([document], ("question_id",)):
        category = record.get("category") or next((name for name in _FIRST_ID if stem.endswith(name)), None)
        if category is None:
            names = "nor does the file's name (coco_pope_<category>.json)"
            raise DataError(f"{document.name}: a label has no 'category', {names}")
        found.setdefault(str(category), []).append(record)
    return found


def _numbered(by_category: Mapping[str, Sequence[JsonDict]]) -> list[JsonDict]:
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


def _numbered_as(questions: Sequence[JsonDict], by_category: Mapping[str, Sequence[JsonDict]]) -> list[JsonDict]:
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


def _reference(record: JsonDict, category: str, number: Any) -> JsonDict:
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


def _counts(items: Sequence[Item]) -> tuple[int, int, int]:
    """Of these items: read as yes and rightly so, read as yes, labelled yes."""
    yes = [(item.parsed == YES, item.facts["gold"] == YES) for item in items]
    return yes.count((True, True)), sum(said for said, _ in yes), sum(true for _, true in yes)


def _confusion(items: Sequence[Item]) -> tuple[int, int, int, int]:
    """True positives, false positives, false negatives, true negatives; a missing answer is the wrong one."""
    outcomes = [(item.facts["gold"] == YES, item.score == 1) for item in items]
    tp, fp, fn, tn = map(outcomes.count, ((True, True), (False, False), (True, False), (False, True)))
    return tp, fp, fn, tn


def _ratios(items: Sequence[Item]) -> JsonDict:
    """The official figures."""
    tp, fp, fn, tn = _confusion(items)
    return {
        "accuracy": (tp + tn) / len(items),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "yes_ratio": (tp + fp) / len(items),
    }


def _lmms(items: Sequence[Item]) -> JsonDict:
    """lmms-eval's figures; only replies of a plain yes or no enter precision and recall, and its "yes ratio" is the
    one of the labels."""
    plain = [item for item in items if item.parsed in (YES, NO)]
    tp, said, true = _counts(plain)
    return {
        "pope_accuracy": mean_score(items),
        "pope_precision": _ratio(tp, said),
        "pope_recall": _ratio(tp, true),
        "pope_f1_score": _ratio(2 * tp, said + true),
        "pope_yes_ratio": fmean(item.facts["gold"] == YES for item in items),
    }


def _vlmevalkit(items: Sequence[Item]) -> JsonDict:
    """VLMEvalKit's row in percent; ``Overall`` is F1, and a reply that is neither yes nor no counts as no there."""
    tp, said, true = _counts(items)
    return {
        "Overall": 100 * _ratio(2 * tp, said + true),
        "acc": 100 * mean_score(items),
        "precision": 100 * _ratio(tp, said),
        "recall": 100 * _ratio(tp, true),
    }


def _ratio(part: float, whole: float) -> float:
    """0 for a zero denominator; the official script stops there."""
    return part / whole if whole else 0.0


BENCHMARK = Pope()
