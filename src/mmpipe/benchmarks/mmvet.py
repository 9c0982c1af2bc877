"""MM-Vet (Yu et al. 2023, arXiv 2308.02490): 218 open questions, graded by the authors' online grader.

Files are the official ``mm-vet.json`` (``{"v1_0": {imagename, question, answer, ...}}``) and the folder of the images,
or the table of the hub (role ``parquet``). There is no local score: the answers are written in the form that the
grader accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmpipe.benchmarks.base import AnswerPair, Benchmark, Item, Protocol
from mmpipe.benchmarks.jsonl import JsonDict, key
from mmpipe.errors import DataError

_PREFIX = "v1_"


class MmVet(Benchmark):
    """MM-Vet."""

    name = "mmvet"
    submission = "json"
    indent = 2
    files = {"questions": "mm-vet.json", "images": "images", "parquet": "data"}
    fields = ("question_id",)
    listed_by = "question_id"
    hub_columns = ("question_id", "question", "answer")
    image = "{imagename}"
    protocols = (Protocol("mmvet", "the bare question; graded online", max_new_tokens=1024, aliases=("llava",)),)

    def reference_keys(self, reference: JsonDict) -> list[tuple[str, ...]]:
        return [(_number(reference["question_id"]),)]

    def answer_keys(self, answer: JsonDict) -> list[tuple[str, ...]]:
        return [(_number(answer["question_id"]),)]

    def rate(self, pairs: Sequence[AnswerPair], protocol: Protocol) -> tuple[list[Item], JsonDict]:
        raise DataError("mmvet: the score comes from the authors' online grader; write its file with 'convert'")

    def document(self, pairs: Sequence[AnswerPair]) -> JsonDict:
        """The grader's file ``{"v1_<number>": reply}``; questions without answer are left out."""
        return {_PREFIX + _number(p.reference["question_id"]): p.text for p in pairs if p.answered}

    def convert(self, pairs: Sequence[AnswerPair], out: Path) -> JsonDict:
        return super().convert(pairs, out) | {"answers": sum(pair.answered for pair in pairs)}


def _number(value: int | str) -> str:
    return key(value).removeprefix(_PREFIX)


BENCHMARK = MmVet()
