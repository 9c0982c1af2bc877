"""MM-Vet (Yu et al. 2023, arXiv 2308.02490): 218 open questions, graded by the authors' online grader.

Files are the official ``mm-vet.json`` (``{"v1_0": {imagename, question, answer, ...}}``) and the folder of
the images, or the table of the hub (role ``parquet``). There is no local score: the answers are written in
the form that the grader accepts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from mmpipe.benchmarks.base import Benchmark, Document, Item, Pair, Protocol, Question, Record, Source, key, records_of
from mmpipe.benchmarks.jsonl import read_document, write_document
from mmpipe.benchmarks.readers import hub_records, images_of, on_hub
from mmpipe.errors import DataError

_PREFIX = "v1_"


class MmVet(Benchmark):
    """MM-Vet."""

    name = "mmvet"
    submission = "json"
    files: ClassVar[Mapping[str, str]] = {"questions": "mm-vet.json", "images": "images", "parquet": "data"}
    protocols = (Protocol("mmvet", "the bare question; graded online", max_new_tokens=1024, aliases=("llava",)),)

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        records = self.references(source, protocol)
        images = images_of(source, (str(record["imagename"]) for record in records))
        for record, image in zip(records, images, strict=True):
            yield Question(id=record["question_id"], text=str(record["question"]), images=(image,))

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        if on_hub(source):
            return hub_records(source, ("question_id", "question", "answer"))
        return self.parse_references([read_document(source.path("questions"))])

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        """The official file, or records; ids with or without ``v1_``."""
        records: list[Record] = []
        for document in documents:
            content = document.content
            if isinstance(content, dict):
                content = [{"question_id": number, **record} for number, record in content.items()]
            records += records_of([Document(document.name, content)], ("question_id",))
        return records

    def reference_keys(self, reference: Record) -> list[tuple[str, ...]]:
        return [(_number(reference["question_id"]),)]

    def answer_keys(self, answer: Record) -> list[tuple[str, ...]]:
        return [(_number(answer["question_id"]),)]

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        raise DataError("mmvet: the score comes from the authors' online grader; write its file with 'convert'")

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """The grader's file ``{"v1_<number>": reply}``; questions without answer are left out and counted."""
        answered = {_PREFIX + _number(p.reference["question_id"]): p.text for p in pairs if p.answered}
        write_document(out, answered, indent=2)
        return {"answers": len(answered)}


def _number(value: int | str) -> str:
    return key(value).removeprefix(_PREFIX)


BENCHMARK = MmVet()
