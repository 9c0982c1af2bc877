"""ChartQA (Masry et al. 2022, arXiv 2203.10244): questions about charts, numbers right within five percent.

Files are the official ``test_human.json`` and ``test_augmented.json`` (``imgname, query, label``) with the
folder ``png``, or the parquet files of the copy on the hub (``type, question, answer, image``).

A number is what Python reads as one, with a final ``%`` divided by 100; there is a tolerance only if both
sides are numbers and the right one is not zero, otherwise the lower-cased texts must be equal. So 2008 passes
for 1999, "5" does not for "5%", nor "0.0" for "0", nor "1,000" for "1000".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
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
    numbered,
    records_of,
)
from mmpipe.benchmarks.jsonl import read_document
from mmpipe.benchmarks.readers import hub_records, images_of, on_hub
from mmpipe.benchmarks.stats import Estimate, estimate_mean
from mmpipe.errors import DataError

_INSTRUCTIONS = {"llava": "\nAnswer the question with a single word.", "vlmevalkit": SHORT_ANSWER}
_TOLERANCE = 0.05
_SPLITS = {"human": "relaxed_human_split", "augmented": "relaxed_augmented_split"}


def number(text: str) -> float | None:
    """The number a text stands for, percents as fractions.

    >>> number("5%"), number("five")
    (0.05, None)
    """
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(reply: str, gold: str) -> bool:
    """ChartQA's relaxed correctness."""
    said, right = number(reply), number(gold)
    if said is not None and right:
        return abs(said - right) / abs(right) <= _TOLERANCE
    return reply.lower() == gold.lower()


def _swapped(reply: str, gold: str) -> bool:
    return relaxed_match(gold, reply)


_RULES: Mapping[str, Callable[[str, str], bool]] = {"official": relaxed_match, "qwen": _swapped}


class ChartQa(Benchmark):
    """ChartQA's test split."""

    name = "chartqa"
    files: ClassVar[Mapping[str, str]] = {
        "human": "test_human.json",
        "augmented": "test_augmented.json",
        "images": "png",
        "parquet": "data",
    }
    protocols = (
        Protocol("chartqa", "relaxed accuracy as in lmms-eval", max_new_tokens=16, aliases=("lmms", "libmoe", "llava")),
        Protocol(
            "qwen", "Qwen-VL's evaluator, whose tolerance is relative to the reply", rule="qwen", max_new_tokens=16
        ),
        Protocol(
            "vlmevalkit",
            "VLMEvalKit: the same rule; the prompt asks for a word or phrase",
            prompt="vlmevalkit",
            max_new_tokens=2048,
        ),
    )

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        records = self.references(source, protocol)
        images = images_of(source, (record["imgname"] for record in records))
        for record, image in zip(records, images, strict=True):
            yield Question(
                id=record["question_id"], text=record["question"] + _INSTRUCTIONS[protocol.prompt], images=(image,)
            )

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        if on_hub(source):
            rows = hub_records(source, ("type", "question", "answer"))
            return self.parse_references([Document(source.files["parquet"], rows)])
        return self.parse_references([read_document(source.path(role)) for role in ("human", "augmented")])

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        found = [_reference(record, document.name) for document in documents for record in records_of([document])]
        return numbered(found)

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        items = [_rate(pair, _RULES[protocol.rule]) for pair in pairs]
        metrics = {"relaxed_overall": fmean(item.score for item in items)}
        for split, metric in _SPLITS.items():
            scores = [item.score for item in items if item.facts["split"] == split]
            if scores:
                metrics[metric] = fmean(scores)
        return items, metrics

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        return estimate_mean("relaxed_overall", [i.score for i in items], [i.unit for i in items])


def _reference(record: Record, where: str) -> Record:
    """A record with ``question``, ``answer`` and ``type``, whatever the copy calls them."""
    question, answer = record.get("question", record.get("query")), record.get("answer", record.get("label"))
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if question is None or answer is None or isinstance(answer, list):
        raise DataError(f"{where}: a record needs 'question' and one 'answer' (or 'query' and 'label')")
    kind = str(record.get("type", record.get("human_or_machine", PurePosixPath(where).stem)))
    split = "human" if "human" in kind or kind == "0" else "augmented"
    known: Record = {name: record[name] for name in ("question_id", "id", "index", "imgname") if name in record}
    return {**known, "question": question, "answer": str(answer), "type": f"{split}_test"}


def _rate(pair: Pair, rule: Callable[[str, str], bool]) -> Item:
    reference = pair.reference
    reply = pair.text.strip()
    return Item(
        id=reference["question_id"],
        score=float(pair.answered and rule(reply, reference["answer"])),
        unit=str(reference.get("imgname", key(reference["question_id"]))),
        parsed=reply if pair.answered else None,
        answered=pair.answered,
        facts={"gold": reference["answer"], "split": reference["type"].removesuffix("_test")},
    )


BENCHMARK = ChartQa()
