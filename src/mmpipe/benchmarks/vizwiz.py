"""VizWiz-VQA (Gurari et al. 2018, arXiv 1802.08218): questions of blind people about their photographs.

Files are the official ``val.json`` or ``test.json`` (a list of ``image, question, answers``) and the folder
of the images. A question's id is its place in the list, as in LLaVA's question file (role ``prompts``); the
image's name is accepted too, and is the id in the table on the hub (role ``parquet``). The test split has
no public answers: its submission file goes to EvalAI.

The official scorer normalises the prediction but never the human answers. Its table of contractions is
written with typographic apostrophes but for a few entries, so most contractions it restores equal no human
answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
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
)
from mmpipe.benchmarks.jsonl import write_document
from mmpipe.benchmarks.readers import as_llava_asks, hub_records, images_of, on_hub
from mmpipe.benchmarks.stats import Estimate, estimate_mean
from mmpipe.benchmarks.text import CONTRACTIONS, drop_articles, drop_punctuation, evalai_normal, one_line, soft_accuracy
from mmpipe.errors import DataError

_UNANSWERABLE = "unanswerable"
_INSTRUCTION = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."

# The entries of the official table that have plain apostrophes in their value, and in their key.
_PLAIN_VALUES = frozenset(["ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"])
_PLAIN_KEYS = frozenset(("couldn'tve", "hadn'tve"))


def _typographic(text: str) -> str:
    return text.replace("'", "’")


_CONTRACTIONS = {
    spelt if spelt in _PLAIN_KEYS else _typographic(spelt): full if full in _PLAIN_VALUES else _typographic(full)
    for spelt, full in CONTRACTIONS.items()
}


class VizWiz(Benchmark):
    """VizWiz-VQA."""

    name = "vizwiz"
    submission = "json"
    files: ClassVar[Mapping[str, str]] = {
        "questions": "val.json",
        "images": "val",
        "prompts": "llava_test.jsonl",
        "parquet": "data",
    }
    protocols = (
        Protocol(
            "vizwiz_val", "the VizWiz API on answers normalised for upload, as LLaVA converts them", aliases=("llava",)
        ),
        Protocol("raw", "the VizWiz API on the replies as they are", rule="raw"),
        Protocol("lmms", "lmms-eval: both sides normalised, question capitalised", rule="lmms", prompt="lmms"),
        Protocol("m4c", "both sides normalised by MMF's m4c evaluator", rule="m4c"),
    )

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        if protocol.prompt == "llava" and source.has("prompts"):
            yield from as_llava_asks(source)
            return
        records = self.references(source, protocol)
        images = images_of(source, (record["image"] for record in records))
        for record, image in zip(records, images, strict=True):
            question = str(record["question"])
            if protocol.prompt == "lmms":
                question = question.capitalize()
            yield Question(id=record["question_id"], text=question + _INSTRUCTION + SHORT_ANSWER, images=(image,))

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        if on_hub(source):
            rows = hub_records(source, ("question_id", "question", "answers"), ("category",))
            return [_named_as_official(row) for row in rows]
        return self.read_references([source.path("questions")])

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        records = records_of(documents, ("image", "question"))
        return [{"question_id": place, **record} for place, record in enumerate(records)]

    def reference_keys(self, reference: Record) -> list[tuple[str, ...]]:
        name = str(reference["image"])
        return [(key(reference["question_id"]),), (name,), (PurePosixPath(name).stem,)]

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        items = [_rate(pair, protocol.rule) for pair in pairs]
        mean = fmean(item.score for item in items)
        if protocol.rule == "lmms":
            return items, {"exact_match": mean}
        if protocol.rule == "m4c":
            return items, {"accuracy": 100 * mean}
        metrics: Record = {"overall": round(100 * mean, 4)}
        if all("answerable" in pair.reference for pair in pairs):
            metrics["unanswerability"] = _unanswerability(pairs, items)
        return items, metrics

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        metric = next(iter(metrics))
        scale = 1.0 if protocol.rule == "lmms" else 100.0
        return estimate_mean(metric, [item.score for item in items], [item.unit for item in items], scale)

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """The list EvalAI accepts: ``{"image", "answer"}`` with normalised answers.

        Raises DataError when an answer is missing, which the server would not accept.
        """
        missing = [str(pair.reference["image"]) for pair in pairs if not pair.answered]
        if missing:
            raise DataError(f"vizwiz: {len(missing)} images have no answer, e.g. {', '.join(missing[:5])}")
        write_document(out, [{"image": pair.reference["image"], "answer": evalai_normal(pair.text)} for pair in pairs])
        return {}


def _named_as_official(row: Record) -> Record:
    """A row of the hub's table, whose id is the image's name, with or without extension."""
    stem = PurePosixPath(str(row["question_id"])).stem
    kind = {"answer_type": row["category"]} if "category" in row else {}
    return {**kind, "question_id": stem, "image": f"{stem}.jpg", "question": row["question"], "answers": row["answers"]}


def _api_normal(text: str) -> str:
    return drop_articles(drop_punctuation(one_line(text)), _CONTRACTIONS)


def _rate(pair: Pair, rule: str) -> Item:
    humans = pair.reference.get("answers")
    if not humans:
        raise DataError(
            f"vizwiz: {pair.reference['image']} has no human answers; the test split is scored by EvalAI: "
            "write its submission file with 'convert'"
        )
    texts = [str(human["answer"] if isinstance(human, dict) else human) for human in humans]
    parsed, gold = _normalised(pair.text, texts, rule)
    return Item(
        id=pair.reference["question_id"],
        score=soft_accuracy(parsed, gold) if pair.answered else 0.0,
        unit=str(pair.reference["image"]),
        parsed=parsed if pair.answered else None,
        answered=pair.answered,
        facts={"image": pair.reference["image"]},
    )


def _normalised(reply: str, humans: Sequence[str], rule: str) -> tuple[str, Sequence[str]]:
    if rule in ("lmms", "m4c"):
        return evalai_normal(reply), [evalai_normal(human) for human in humans]
    return _api_normal(reply if rule == "raw" else evalai_normal(reply)), humans


def _unanswerability(pairs: Sequence[Pair], items: Sequence[Item]) -> Record:
    """Finding the questions that cannot be answered, from the answers "unanswerable" (percent, 4
    decimals)."""
    gold = [not int(pair.reference["answerable"]) for pair in pairs]
    said = [item.parsed == _UNANSWERABLE for item in items]
    hits = sum(g and s for g, s in zip(gold, said, strict=True))
    positives, named = sum(gold), sum(said)
    recall = hits / positives if positives else 0.0
    precision = hits / named if named else 0.0
    average = recall * precision + (1 - recall) * positives / len(gold)
    f1 = 2 * hits / (positives + named) if positives + named else 0.0
    return {"average_precision": round(100 * average, 4), "f1_score": round(100 * f1, 4)}


BENCHMARK = VizWiz()
