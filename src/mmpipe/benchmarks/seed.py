"""SEED-Bench (Li et al. 2023, arXiv 2307.16125): multiple choice in twelve kinds; the image questions are
asked.

Files are the official ``SEED-Bench.json`` (``{"questions": [...], "question_type": {name: number}}``) and the
folder of the images. A reply is right if it is the letter and nothing else, as in LLaVA's script.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from mmpipe.artifacts.files import write_jsonl
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
    records_of,
)
from mmpipe.benchmarks.choices import options_block
from mmpipe.benchmarks.jsonl import read_document
from mmpipe.benchmarks.stats import Estimate, estimate_mean

_FIELDS = ("question_id", "answer", "question_type_id", "data_type")


class Seed(Benchmark):
    """SEED-Bench, image part."""

    name = "seed"
    files: ClassVar[Mapping[str, str]] = {"questions": "SEED-Bench.json", "images": "SEED-Bench-image"}
    protocols = (Protocol("seed_image", "the reply must be the letter", max_new_tokens=1024, aliases=("llava",)),)

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        for record in self.references(source, protocol):
            options = [str(record[f"choice_{letter}"]) for letter in "abcd"]
            yield Question(
                id=record["question_id"],
                text=f"{record['question']}\n{options_block(options)}{OPTION_LETTER}",
                images=(source.image(str(record["data_id"])),),
            )

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        records = self.parse_references([read_document(source.path("questions"))])
        return [record for record in records if record["data_type"] == "image"]

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        """The official file, or records; kinds get their names where the file gives them."""
        records: list[Record] = []
        for document in documents:
            content = document.content
            whole = content if isinstance(content, dict) else {"questions": content}
            names = {key(number): name for name, number in whole.get("question_type", {}).items()}
            for record in records_of([Document(document.name, whole.get("questions"))], _FIELDS):
                number = key(record["question_type_id"])
                records.append({"question_type": names.get(number, number), **record})
        return records

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        # the protocol asks about images; who asked about videos too gets them counted
        items = [_rate(pair) for pair in pairs if pair.answered or pair.reference["data_type"] == "image"]
        metrics: Record = {"accuracy": _percent(items)}
        for name in ("image", "video"):
            members = [item for item in items if item.facts["data_type"] == name]
            if members:
                metrics[f"{name}_accuracy"] = _percent(members)
        kinds: dict[str, list[Item]] = {}
        for item in items:
            kinds.setdefault(str(item.facts["question_type"]), []).append(item)
        return items, metrics | {"per_type": {name: _percent(members) for name, members in kinds.items()}}

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        return estimate_mean("accuracy", [i.score for i in items], [i.unit for i in items], 100)

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """The lines of the leaderboard: ``{"question_id", "prediction"}``, ids as text."""
        write_jsonl(out, ({"question_id": key(p.reference["question_id"]), "prediction": p.text} for p in pairs))
        return {}


def _rate(pair: Pair) -> Item:
    reference = pair.reference
    return Item(
        id=reference["question_id"],
        score=float(pair.answered and pair.text == reference["answer"]),
        unit=str(reference.get("data_id", reference["question_id"])),
        parsed=pair.text if pair.text in tuple("ABCD") else None,
        answered=pair.answered,
        unparsed=pair.answered and pair.text not in tuple("ABCD"),
        facts={"question_type": reference["question_type"], "data_type": reference["data_type"]},
    )


def _percent(items: Sequence[Item]) -> float:
    return 100 * fmean(item.score for item in items)


BENCHMARK = Seed()
