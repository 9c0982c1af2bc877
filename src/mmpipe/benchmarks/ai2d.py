"""AI2D (Kembhavi et al. 2016, arXiv 1603.07396): multiple choice about textbook diagrams.

Files are the parquet files of the test split in the copy that everyone evaluates (``question, options,
answer, image``; the answer is the number of the option). There is no official scorer; the default is the rule
of lmms-eval: a letter with a period at the beginning stands for the reply, and case and punctuation are
ignored.
"""

from __future__ import annotations

import re
import string
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
    numbered,
    records_of,
    require,
)
from mmpipe.benchmarks.choices import LETTERS, infer_option, options_block
from mmpipe.benchmarks.image_bytes import hub_image
from mmpipe.benchmarks.jsonl import iter_rows
from mmpipe.benchmarks.stats import Estimate, estimate_mean
from mmpipe.errors import DataError

_LEADING_LETTER = re.compile(r"\s*([A-Z])\.")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FIELDS = ("question", "options", "answer")


class Ai2d(Benchmark):
    """AI2D's test split."""

    name = "ai2d"
    files: ClassVar[Mapping[str, str]] = {"questions": "data"}
    protocols = (
        Protocol("lmms", "lmms-eval: exact match after taking a leading letter", max_new_tokens=16, aliases=("llava",)),
        Protocol("libmoe", "the same rule with longer replies", max_new_tokens=512),
        Protocol("vlmevalkit", "VLMEvalKit's option rule without judge", rule="infer"),
    )

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        for place, row in enumerate(iter_rows(source.path("questions"))):
            require(row, (*_FIELDS, "image"), f"ai2d, row {place}")
            yield Question(
                id=row.get("question_id", place),
                text=f"{row['question']}\n{options_block(row['options'])}{OPTION_LETTER}",
                images=(hub_image(row["image"], f"ai2d, row {place}"),),
            )

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        return self.read_references([source.path("questions")])

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        return numbered(records_of(documents, _FIELDS))

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        items = [_rate(pair, protocol.rule) for pair in pairs]
        metric = "accuracy" if protocol.rule == "infer" else "exact_match"
        return items, {metric: fmean(item.score for item in items)}

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        return estimate_mean(next(iter(metrics)), [i.score for i in items], [i.unit for i in items])


def _rate(pair: Pair, rule: str) -> Item:
    reference = pair.reference
    gold = _gold(reference)
    if rule == "infer":
        parsed = infer_option(pair.text, dict(zip(LETTERS, reference["options"], strict=False)))
        right, unparsed = parsed == gold, parsed is None
    else:
        found = _LEADING_LETTER.match(pair.text)
        parsed = found.group(1) if found else pair.text.strip()
        plain = parsed.lower().translate(_NO_PUNCTUATION)
        right, unparsed = plain == gold.lower(), plain not in map(str.lower, LETTERS)
    return Item(
        id=reference["question_id"],
        score=float(pair.answered and right),
        unit=key(reference["question_id"]),
        parsed=parsed if pair.answered else None,
        answered=pair.answered,
        unparsed=pair.answered and unparsed,
        facts={"gold": gold},
    )


def _gold(reference: Record) -> str:
    """The letter of the right option."""
    answer = key(reference["answer"])
    if answer.isdecimal() and int(answer) < len(reference["options"]):
        return LETTERS[int(answer)]
    if len(answer) == 1 and answer in LETTERS:
        return answer
    raise DataError(f"ai2d: question {reference['question_id']} has the answer {answer!r}, not an option's number")


BENCHMARK = Ai2d()
