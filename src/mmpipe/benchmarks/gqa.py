"""GQA (Hudson and Manning 2019, arXiv 1902.09506): compositional questions about scene graphs, exact match.

Files are the official ``testdev_balanced_questions.json`` (``{id: question}``) and the folder ``images``, LLaVA's
question file beside them if there (role ``prompts``), or the two tables on the hub, questions and images. By the
official ``eval.py`` on LLaVA's converted answers the prediction is the reply without periods at the end, in lower case;
nothing else is normalised. Only balanced questions count.

Validity and plausibility are reported where the choices of the split stand beside the questions (role ``choices``),
consistency where the answers to entailed questions are there. Grounding needs attention over scene graphs and is not.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mmpipe.benchmarks.base import AnswerPair, Item, Protocol, mean_score
from mmpipe.benchmarks.jsonl import Document, JsonDict, key, listed, numbered, parquet_rows, records_of, require
from mmpipe.benchmarks.readers import BenchmarkFiles
from mmpipe.benchmarks.short_answer import AnswerRule, ShortAnswer
from mmpipe.errors import DataError

# Operations of a question's program that are no reasoning step of their own.
_NO_STEP = ("exist", "query: name", "choose name")
_CHOICES = {"valid", "plausible"}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def predicted(reply: str) -> str:
    """The prediction that LLaVA's converter makes of a reply.

    >>> predicted("Dark blue.")
    'dark blue'
    """
    return reply.rstrip(".").lower()


def _exact(normal: Callable[[str], str], gold_normal: Callable[[str], str] | None = None) -> AnswerRule:
    return lambda reply, gold: (normal(reply), normal(reply) == (gold_normal or normal)(gold))


class Gqa(ShortAnswer):
    """GQA's balanced test-dev split."""

    name = "gqa"
    submission = "json"
    files = {
        "questions": "testdev_balanced_questions.json",
        "images": "images",
        "prompts": "llava_gqa_testdev_balanced.jsonl",
        "choices": "val_choices.json",
        "parquet": "testdev_balanced_instructions",
        "parquet_images": "testdev_balanced_images",
    }
    optional_roles = ("choices",)
    hub_columns = ("id", "imageId", "question", "answer")
    hub_optional = ("isBalanced", "types", "groups", "semantic", "entailed")
    image = "{imageId}.jpg"
    unit_field = "imageId"
    rules = {
        "official": _exact(predicted, str),
        "lmms": _exact(lambda text: text.lower().translate(_NO_PUNCTUATION)),
        "vlmevalkit": _exact(lambda text: text.strip().lower()),
    }
    protocols = (
        Protocol("gqa", "the official eval.py on LLaVA's converted answers", scale=100, aliases=("llava",)),
        Protocol("lmms", "lmms-eval: case and punctuation ignored on both sides", rule="lmms", metric="exact_match",
                 max_new_tokens=16, aliases=("libmoe",)),
        Protocol("vlmevalkit", "VLMEvalKit: case and blanks at the ends ignored on both sides", rule="vlmevalkit",
                 metric="Overall", scale=100, max_new_tokens=2048),
    )  # fmt: skip

    def images(self, source: BenchmarkFiles, records: Sequence[JsonDict]) -> Iterator[bytes | Path | None]:
        """Those of the hub are a table of their own, by the id of the image (the balanced splits have few hundred)."""
        if not source.on_hub:
            yield from super().images(source, records)
            return
        table = source.path("parquet_images")
        names = [key(row["id"]) for row in parquet_rows(table, ["id"])]
        images = dict(zip(names, source.hub_images(role="parquet_images"), strict=True))
        for name in (key(record["imageId"]) for record in records):
            if name not in images:
                raise DataError(f"{table}: the image '{name}' is not in the table")
            yield images[name]

    def parse_references(self, documents: Sequence[Document]) -> list[JsonDict]:
        """``{id: question}`` or a list of questions with their ``question_id`` or ``id``; besides, the choices of a
        split, ``{id: {"valid", "plausible"}}``."""
        records: list[JsonDict] = []
        choices: dict[str, JsonDict] = {}
        for document in documents:
            content = document.content
            if isinstance(content, dict):
                choices |= content.get("choices", {})
                content = content.get("questions", content)
                given = list(content.values()) if isinstance(content, dict) else [None]
                if all(isinstance(q, dict) and "answer" not in q and _CHOICES & set(q) for q in given):
                    choices |= content
                    continue
            records += numbered(records_of([Document(document.name, listed(content, "question_id"))]))
        for record in records:
            number = key(record["question_id"])
            require(record, ("answer",), f"gqa, question {number}")
            if choices and number not in choices:
                raise DataError(f"gqa: the choices lack the question {number}; are they of another split?")
        names = sorted(_CHOICES, reverse=True) if choices else []
        return [{**r, **{name: choices[key(r["question_id"])].get(name, []) for name in names}} for r in records]

    def rate(self, pairs: Sequence[AnswerPair], protocol: Protocol) -> tuple[list[Item], JsonDict]:
        if protocol.rule != "official":
            return super().rate(pairs, protocol)
        counted = [pair for pair in pairs if pair.reference.get("isBalanced", True)]
        if not counted:
            raise DataError("gqa: none of the questions is balanced; there is nothing to score")
        items = [self.item(pair, protocol) for pair in counted]
        return items, {**_report(counted, items), **_sense(counted), **_consistency(pairs)}

    def submitted(self, pair: AnswerPair) -> JsonDict:
        """An entry of ``testdev_balanced_predictions.json``; a missing answer is an empty one."""
        return {"questionId": key(pair.reference["question_id"]), "prediction": predicted(pair.text)}


def _report(pairs: Sequence[AnswerPair], items: Sequence[Item]) -> JsonDict:
    """The official figures in percent, under its names."""

    def means(label: Callable[[JsonDict], Any]) -> dict[str, float]:
        """Mean score by the label of the question; questions without label are left out."""
        labels = [label(pair.reference) for pair in pairs]
        groups: dict[Any, list[float]] = {name: [] for name in sorted(set(labels) - {None})}
        for name, item in zip(labels, items, strict=True):
            if name is not None:
                groups[name].append(item.score)
        return {str(name): 100 * fmean(scores) for name, scores in groups.items()}

    structural = means(lambda q: q.get("types", {}).get("structural"))
    kinds = means(lambda q: (s := q.get("types", {}).get("structural")) and ("open" if s == "query" else "binary"))
    return {
        "accuracy": 100 * mean_score(items),
        "binary": kinds.get("binary", 0.0),
        "open": kinds.get("open", 0.0),
        "distribution": _distribution(pairs, items),
        "accuracyPerStructuralType": structural,
        "accuracyPerSemanticType": means(lambda q: q.get("types", {}).get("semantic")),
        "accuracyPerSteps": means(_steps),
        "accuracyPerLength": means(lambda q: len(q.get("question", "").split()) or None),
    }


def _steps(question: JsonDict) -> int | None:
    """Length of the question's program, naming and existence not counted."""
    program = question.get("semantic")
    if not program:
        return None
    texts = [f"{step['operation']}: {step['argument']}" for step in program]
    return sum(not any(pattern in text for pattern in _NO_STEP) for text in texts)


def _sense(pairs: Sequence[AnswerPair]) -> dict[str, float]:
    """Share of the predictions among the valid answers (a colour where one is asked for) and among the plausible ones
    (a colour that such a thing has), in percent; nothing where the choices are not there."""
    return {
        name: 100 * fmean(p.answered and predicted(p.text) in p.reference[choices] for p in pairs)
        for name, choices in (("validity", "valid"), ("plausibility", "plausible"))
        if all(choices in pair.reference for pair in pairs)
    }


def _consistency(pairs: Sequence[AnswerPair]) -> dict[str, float]:
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


def _distribution(pairs: Sequence[AnswerPair], items: Sequence[Item]) -> float:
    """Chi-square between gold and predicted answers by group, weighted by the groups' sizes, over 100."""
    gold: dict[str, Counter[str]] = {}
    said: dict[str, Counter[str]] = {}
    for pair, item in zip(pairs, items, strict=True):
        group = (pair.reference.get("groups") or {}).get("global")
        if group is not None:
            gold.setdefault(group, Counter())[str(pair.reference["answer"])] += 1
            said.setdefault(group, Counter())[item.parsed or ""] += 1
    weighted = size = 0.0
    for group, counts in gold.items():
        weighted += counts.total() * sum((said[group][answer] - n) ** 2 / n for answer, n in counts.items())
        size += counts.total()
    return weighted / size / 100 if size else 0.0


BENCHMARK = Gqa()
