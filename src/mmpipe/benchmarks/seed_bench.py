"""SEED-Bench (Li et al. 2023, arXiv 2307.16125): multiple choice in twelve kinds; the image questions are asked.

Files are the official ``SEED-Bench.json`` (``{"questions": [...], "question_type": {name: number}}``) and the folder
of the images. A reply is right if it is the letter and nothing else, as in LLaVA's script
(``convert_seed_for_submission.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from mmpipe.benchmarks.base import AnswerPair, Item, Protocol, grouped, mean_score
from mmpipe.benchmarks.jsonl import Document, JsonDict, key, records_of
from mmpipe.benchmarks.multiple_choice import MultipleChoice
from mmpipe.benchmarks.readers import BenchmarkFiles


class SeedBench(MultipleChoice):
    """SEED-Bench, image part."""

    name = "seed"
    files = {"questions": "SEED-Bench.json", "images": "SEED-Bench-image"}
    fields = ("question_id", "answer", "question_type_id", "data_type")
    image = "{data_id}"
    unit_field = "data_id"
    rules = {"official": lambda reply, options: reply if reply in tuple("ABCD") else None}
    protocols = (
        Protocol("seed_image", "the reply must be the letter", scale=100, max_new_tokens=1024, aliases=("llava",)),
    )

    def options(self, reference: JsonDict) -> dict[str, str]:
        return {c.upper(): str(reference[f"choice_{c}"]) for c in "abcd" if f"choice_{c}" in reference}

    def references(self, source: BenchmarkFiles, protocol: Protocol) -> list[JsonDict]:
        return [record for record in super().references(source, protocol) if record["data_type"] == "image"]

    def parse_references(self, documents: Sequence[Document]) -> list[JsonDict]:
        """The official file, or records; kinds get their names where the file gives them."""
        records: list[JsonDict] = []
        for document in documents:
            content = document.content
            whole = content if isinstance(content, dict) else {"questions": content}
            names = {key(number): name for name, number in whole.get("question_type", {}).items()}
            for record in records_of([Document(document.name, whole.get("questions"))], self.fields):
                number = key(record["question_type_id"])
                records.append({"question_type": names.get(number, number), **record})
        return records

    def facts(self, pair: AnswerPair, letter: str | None) -> JsonDict:
        return {name: pair.reference[name] for name in ("question_type", "data_type")}

    def rate(self, pairs: Sequence[AnswerPair], protocol: Protocol) -> tuple[list[Item], JsonDict]:
        """The image questions, and those about videos that were answered all the same."""
        return super().rate([p for p in pairs if p.answered or p.reference["data_type"] == "image"], protocol)

    def metrics(self, items: Sequence[Item], pairs: Sequence[AnswerPair], protocol: Protocol) -> JsonDict:
        kinds = {f"{name}_accuracy": some for name, some in sorted(grouped(items, "data_type").items())}
        return {
            **{name: 100 * mean_score(some) for name, some in {"accuracy": items, **kinds}.items()},
            "per_type": {name: 100 * mean_score(some) for name, some in grouped(items, "question_type").items()},
        }

    def submitted(self, pair: AnswerPair) -> JsonDict:
        """A line of the leaderboard's file, ids as text."""
        return {"question_id": key(pair.reference["question_id"]), "prediction": pair.text}


BENCHMARK = SeedBench()
