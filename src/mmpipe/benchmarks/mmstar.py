"""MMStar (Chen et al. 2024, arXiv 2403.20330): 1500 multiple-choice questions that need the image, in 6 x 3
abilities.

Files are the official ``mmstar.parquet`` (``index, question, image, answer, category, l2_category,
meta_info``); the question text holds its options. The official rule reads fixed places of the lower-cased
reply: the letter first, in a bracket, after "option " or after "the answer is ". It divides by 250 a category
and by 1500 in all, so an incomplete run scores less; shares of what was really asked stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import ClassVar

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
    require,
)
from mmpipe.benchmarks.choices import extract_letter_lmms
from mmpipe.benchmarks.image_bytes import hub_image
from mmpipe.benchmarks.jsonl import iter_rows
from mmpipe.benchmarks.stats import Estimate, bootstrap, estimate_mean

_FIELDS = ("index", "question", "answer", "category", "l2_category")
_YES_NO = " Please answer yes or no."
_PER_CATEGORY, _IN_ALL = 250, 1500
_BEFORE_THE_LETTER = ("", "(", "option ", "the answer is ")


class MmStar(Benchmark):
    """MMStar."""

    name = "mmstar"
    files: ClassVar[Mapping[str, str]] = {"questions": "mmstar.parquet"}
    protocols = (
        Protocol("mmstar", "the official rule", max_new_tokens=32, aliases=("llava",)),
        Protocol("lmms", "lmms-eval: letter extraction by priority, mean of l2 means", rule="lmms", prompt="lmms"),
        Protocol("libmoe", "the official rule, mean of l2 means", rule="libmoe", prompt="lmms"),
    )

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        for row in iter_rows(source.path("questions")):
            require(row, (*_FIELDS, "image"), "mmstar")
            question = str(row["question"])
            if protocol.prompt == "lmms":
                text = question.strip().replace(_YES_NO, "") + OPTION_LETTER.rstrip(".")
            else:
                text = question + OPTION_LETTER
            yield Question(
                id=row["index"],
                text=text.replace("<image 1>", "").lstrip(),
                images=(hub_image(row["image"], f"mmstar, index {row['index']}"),),
            )

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        return self.read_references([source.path("questions")])

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        return [{"question_id": record["index"], **record} for record in records_of(documents, _FIELDS)]

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        items = [_rate(pair, protocol.rule) for pair in pairs]
        if protocol.rule == "official":
            return items, _official(items)
        categories = _grouped(items, "category")
        return items, {
            "average_of_l2_means": _mean_of_means(items),
            **{name: _mean_of_means(members) for name, members in categories.items()},
        }

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        if protocol.rule == "official":
            return estimate_mean("accuracy_by_count", [i.score for i in items], [i.unit for i in items])
        names = list(_grouped(items, "ability"))
        totals = {}
        for item in items:
            row = [0.0] * (2 * len(names))
            first = 2 * names.index(item.facts["ability"])
            row[first : first + 2] = item.score, 1.0
            totals[item.unit] = row
        value = metrics["average_of_l2_means"]
        return bootstrap("average_of_l2_means", totals, lambda t: (t[..., 0::2] / t[..., 1::2]).mean(axis=-1), value)


def _official(items: Sequence[Item]) -> Record:
    categories, abilities = _grouped(items, "category"), _grouped(items, "ability")
    return {
        "official_final_score_over_1500": sum(item.score for item in items) / _IN_ALL,
        "official_category_over_250": {
            name: sum(item.score for item in members) / _PER_CATEGORY for name, members in categories.items()
        },
        "per_l2": {name: _mean(members) for name, members in abilities.items()},
        "accuracy_by_count": _mean(items),
        "per_category_by_count": {name: _mean(members) for name, members in categories.items()},
    }


def letter_fits(reply: str, gold: str) -> bool:
    """Whether the reply opens with the letter, by the official rule."""
    reply = reply.lower().strip().replace("\n", " ")
    return any(reply.startswith(before + gold.lower().strip()) for before in _BEFORE_THE_LETTER)


def _rate(pair: Pair, rule: str) -> Item:
    reference = pair.reference
    gold = str(reference["answer"])
    parsed = extract_letter_lmms(pair.text, "ABCD") if rule == "lmms" else None
    right = parsed == gold.strip().upper() if rule == "lmms" else letter_fits(pair.text, gold)
    named = parsed if rule == "lmms" else next((c for c in "ABCD" if letter_fits(pair.text, c)), None)
    return Item(
        id=reference["index"],
        score=float(pair.answered and right),
        unit=key(reference["index"]),
        parsed=named if pair.answered else None,
        answered=pair.answered,
        unparsed=pair.answered and named is None,
        facts={
            "gold": gold,
            "category": reference["category"],
            "ability": f"{reference['category']}({reference['l2_category']})",
        },
    )


def _grouped(items: Sequence[Item], label: str) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(str(item.facts[label]), []).append(item)
    return groups


def _mean(items: Sequence[Item]) -> float:
    return fmean(item.score for item in items)


def _mean_of_means(items: Sequence[Item]) -> float:
    return fmean(_mean(members) for members in _grouped(items, "ability").values())


BENCHMARK = MmStar()
