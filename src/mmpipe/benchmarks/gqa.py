"""GQA (Hudson and Manning 2019, arXiv 1902.09506): compositional questions about scene graphs, exact match.

Files are the official ``testdev_balanced_questions.json`` (``{id: question}``) and the folder ``images``,
LLaVA's question file beside them if there (role ``prompts``), or the two tables on the hub, questions and
images. The prediction is the reply without periods at the end, in lower case; nothing else is normalised.
Only balanced questions count.

Validity and plausibility are reported where the choices of the split stand beside the questions (role
``choices``), consistency where the answers to entailed questions are there. Grounding needs attention over scene
graphs and is not.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    numbered,
    records_of,
    require,
)
from mmpipe.benchmarks.jsonl import parquet_rows, write_document
from mmpipe.benchmarks.readers import as_llava_asks, hub_images, hub_records, on_hub
from mmpipe.benchmarks.stats import Estimate, estimate_mean
from mmpipe.errors import DataError

# Operations of a question's program that are no reasoning step of their own.
_NO_STEP = ("exist", "query: name", "choose name")
_EXTRAS = ("isBalanced", "types", "groups", "semantic", "entailed")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Gqa(Benchmark):
    """GQA's balanced test-dev split."""

    name = "gqa"
    submission = "json"
    files: ClassVar[Mapping[str, str]] = {
        "questions": "testdev_balanced_questions.json",
        "images": "images",
        "prompts": "llava_gqa_testdev_balanced.jsonl",
        "choices": "val_choices.json",
        "parquet": "testdev_balanced_instructions",
        "parquet_images": "testdev_balanced_images",
    }
    protocols = (
        Protocol("gqa", "the official eval.py on LLaVA's converted answers", aliases=("llava",)),
        Protocol(
            "lmms",
            "lmms-eval: case and punctuation ignored on both sides",
            rule="lmms",
            max_new_tokens=16,
            aliases=("libmoe",),
        ),
        Protocol(
            "vlmevalkit",
            "VLMEvalKit: case and blanks at the ends ignored on both sides",
            rule="vlmevalkit",
            max_new_tokens=2048,
        ),
    )

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        if source.has("prompts"):
            yield from as_llava_asks(source)
            return
        image = _hub_images(source) if on_hub(source) else lambda name: source.image(f"{name}.jpg")
        for record in self.references(source, protocol):
            require(record, ("question", "imageId"), f"gqa, question {record['question_id']}")
            yield Question(
                id=record["question_id"],
                text=record["question"] + SHORT_ANSWER,
                images=(image(key(record["imageId"])),),
            )

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        if on_hub(source):
            rows = hub_records(source, ("id", "imageId", "question", "answer"), _EXTRAS)
            return self.parse_references([Document(source.files["parquet"], rows)])
        roles = ("questions", "choices") if source.has("choices") else ("questions",)
        return self.read_references([source.path(role) for role in roles])

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        """``{id: question}`` or a list of questions with their ``question_id`` or ``id``; besides, the choices of a
        split, ``{id: {"valid", "plausible"}}``."""
        records: list[Record] = []
        choices: dict[str, Record] = {}
        for document in documents:
            content = document.content
            if isinstance(content, dict):
                choices |= content.get("choices", {})
                content = content.get("questions", content)
                if isinstance(content, dict) and all(map(_is_choices, content.values())):
                    choices |= content
                    continue
            if isinstance(content, dict):
                records += [{"question_id": number, **question} for number, question in content.items()]
            else:
                records += numbered(records_of([Document(document.name, content)]))
        for record in records:
            require(record, ("answer",), f"gqa, question {record['question_id']}")
        return [_with_choices(record, choices) for record in records] if choices else records

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        if protocol.rule in _PLAIN:
            plain = _PLAIN[protocol.rule]
            items = [_rate(pair, plain(pair.text), plain(str(pair.reference["answer"]))) for pair in pairs]
            mean = fmean(item.score for item in items)
            return items, {"exact_match": mean} if protocol.rule == "lmms" else {"Overall": 100 * mean}
        counted = [pair for pair in pairs if pair.reference.get("isBalanced", True)]
        if not counted:
            raise DataError("gqa: none of the questions is balanced; there is nothing to score")
        items = [_rate(pair, predicted(pair.text), str(pair.reference["answer"])) for pair in counted]
        return items, {**_report(counted, items), **_sense(counted), **_consistency(pairs)}

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        scores, units = [item.score for item in items], [item.unit for item in items]
        if protocol.rule == "lmms":
            return estimate_mean("exact_match", scores, units)
        return estimate_mean("accuracy" if protocol.rule == "official" else "Overall", scores, units, 100)

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """``testdev_balanced_predictions.json`` for the official eval.py; a missing answer is an empty
        one."""
        write_document(
            out, [{"questionId": key(p.reference["question_id"]), "prediction": predicted(p.text)} for p in pairs]
        )
        return {}


def _hub_images(source: Source) -> Callable[[str], bytes]:
    """The hub's second table, by the id of the image (the balanced splits have few hundred)."""
    ids = parquet_rows(source.path("parquet_images"), ["id"])
    names = [key(row["id"]) for row in ids]
    images = dict(zip(names, hub_images(source, "parquet_images"), strict=True))

    def image(name: str) -> bytes:
        if name not in images:
            raise DataError(f"{source.path('parquet_images')}: the image '{name}' is not in the table")
        return images[name]

    return image


def predicted(reply: str) -> str:
    """The prediction that LLaVA's converter makes of a reply.

    >>> predicted("Dark blue.")
    'dark blue'
    """
    return reply.rstrip(".").lower()


def _lmms(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION)


_PLAIN: Mapping[str, Callable[[str], str]] = {"lmms": _lmms, "vlmevalkit": lambda text: text.strip().lower()}


def _rate(pair: Pair, prediction: str, gold: str) -> Item:
    reference = pair.reference
    return Item(
        id=reference["question_id"],
        score=float(pair.answered and prediction == gold),
        unit=key(reference.get("imageId", reference["question_id"])),
        parsed=prediction if pair.answered else None,
        answered=pair.answered,
        facts={"gold": gold},
    )


def _report(pairs: Sequence[Pair], items: Sequence[Item]) -> Record:
    """The official figures in percent, under its names."""
    score = {id(pair): item.score for pair, item in zip(pairs, items, strict=True)}
    structural = _means(pairs, score, lambda q: q.get("types", {}).get("structural"))
    kinds = _means(pairs, score, lambda q: _kind(q.get("types", {}).get("structural")))
    return {
        "accuracy": 100 * fmean(item.score for item in items),
        "binary": kinds.get("binary", 0.0),
        "open": kinds.get("open", 0.0),
        "distribution": _distribution(pairs, items),
        "accuracyPerStructuralType": structural,
        "accuracyPerSemanticType": _means(pairs, score, lambda q: q.get("types", {}).get("semantic")),
        "accuracyPerSteps": _means(pairs, score, _steps),
        "accuracyPerLength": _means(pairs, score, lambda q: len(q.get("question", "").split()) or None),
    }


def _kind(structural: str | None) -> str | None:
    return None if structural is None else "open" if structural == "query" else "binary"


def _means(pairs: Sequence[Pair], score: Mapping[int, float], label: Any) -> dict[str, float]:
    """Mean score in percent by the label of the question; questions without label are left out."""
    groups: dict[Any, list[float]] = {}
    for pair in pairs:
        name = label(pair.reference)
        if name is not None:
            groups.setdefault(name, []).append(score[id(pair)])
    return {str(name): 100 * fmean(groups[name]) for name in sorted(groups)}


def _steps(question: Record) -> int | None:
    """Length of the question's program, naming and existence not counted."""
    program = question.get("semantic")
    if not program:
        return None
    texts = [f"{step['operation']}: {step['argument']}" for step in program]
    return sum(not any(pattern in text for pattern in _NO_STEP) for text in texts)


def _is_choices(value: Any) -> bool:
    return isinstance(value, dict) and "answer" not in value and not {"valid", "plausible"}.isdisjoint(value)


def _with_choices(record: Record, choices: Mapping[str, Record]) -> Record:
    """The question with its valid and plausible answers. Raises DataError where the choices lack it."""
    number = key(record["question_id"])
    if number not in choices:
        raise DataError(f"gqa: the choices lack the question {number}; are they of another split?")
    return {**record, **{name: choices[number].get(name, []) for name in ("valid", "plausible")}}


def _sense(pairs: Sequence[Pair]) -> dict[str, float]:
    """Share of the predictions among the valid answers (a colour where one is asked for) and among the plausible ones
    (a colour that such a thing has), in percent; nothing where the choices are not there."""
    return {
        name: 100 * fmean(p.answered and predicted(p.text) in p.reference[choices] for p in pairs)
        for name, choices in (("validity", "valid"), ("plausibility", "plausible"))
        if all(choices in pair.reference for pair in pairs)
    }


def _consistency(pairs: Sequence[Pair]) -> dict[str, float]:
    """Of the balanced questions answered right, the mean share of their entailed questions that are right too, in
    percent.

    Entailed questions that are not among the references are left out; where none is, so is the figure.
    """
    right = {
        key(p.reference["question_id"]): p.answered and predicted(p.text) == str(p.reference["answer"]) for p in pairs
    }
    shares = []
    for pair in pairs:
        own = key(pair.reference["question_id"])
        entailed = pair.reference.get("entailed")
        others = [e for e in map(key, entailed if isinstance(entailed, list) else ()) if e != own and e in right]
        if pair.reference.get("isBalanced", True) and right[own] and others:
            shares.append(fmean(right[other] for other in others))
    return {"consistency": 100 * fmean(shares)} if shares else {}


def _distribution(pairs: Sequence[Pair], items: Sequence[Item]) -> float:
    """Chi-square between gold and predicted answers by group, weighted by the groups' sizes, over 100."""
    gold: dict[str, Counter[str]] = {}
    said: dict[str, Counter[str]] = {}
    for pair, item in zip(pairs, items, strict=True):
        group = (pair.reference.get("groups") or {}).get("global")
        if group is not None:
            gold.setdefault(group, Counter())[str(pair.reference["answer"])] += 1
            said.setdefault(group, Counter())[item.parsed or ""] += 1
    weighted = sum(
        counts.total() * sum((said[group][answer] - n) ** 2 / n for answer, n in counts.items())
        for group, counts in gold.items()
    )
    size = sum(counts.total() for counts in gold.values())
    return weighted / size / 100 if size else 0.0


BENCHMARK = Gqa()
