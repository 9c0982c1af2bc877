"""MMHal-Bench (Sun et al. 2023, arXiv 2309.14525): 96 open questions in eight kinds, rated by a judge from 0
to 6.

Files are RLAIF-V's ``mmhal-bench_with_image.jsonl`` (images in base64) or the official
``response_template.json`` with the folder of the images. A rating of 3 or more means no hallucination. The
rating is read as in the published scripts: exactly one of "rating: 0" to "rating: 6" must occur in the
judge's reply, otherwise the rating is 0.

The instruction given to the judge here is this project's own; scores compare with each other for one judge
model only.
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
from mmpipe.benchmarks.image_bytes import decode_base64
from mmpipe.benchmarks.jsonl import read_document, write_document
from mmpipe.benchmarks.judging import JudgeRequest
from mmpipe.benchmarks.stats import Estimate, estimate_mean

_FIELDS = ("question", "gt_answer", "image_content")
_KINDS = (
    "attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other",
)  # fmt: skip
_NO_HALLUCINATION = 3


class MmHal(Benchmark):
    """MMHal-Bench."""

    name = "mmhal"
    submission = "json"
    files: ClassVar[Mapping[str, str]] = {
        "questions": "mmhal-bench_with_image.jsonl",
        "template": "response_template.json",
        "images": "images",
    }
    protocols = (
        Protocol("mmhal", "the bare question; rating by a judge", max_new_tokens=1024, judged=True),
        Protocol(
            "rlaifv",
            "the same by RLAIF-V's beam search with three beams",
            max_new_tokens=1024,
            num_beams=3,
            judged=True,
        ),
        Protocol(
            "llava_mod",
            "a short answer asked for, as LLaVA-MoD's script does by default",
            prompt="short",
            max_new_tokens=1024,
            judged=True,
        ),
    )

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        for place, record in enumerate(self._records(source)):
            if "image" in record:
                image: bytes | Path = decode_base64(str(record["image"]), f"mmhal, record {place}")
            else:
                image = source.image(PurePosixPath(str(record["image_src"])).name)
            text = str(record["question"])
            short = SHORT_ANSWER if protocol.prompt == "short" else ""
            yield Question(id=place, text=text + short, images=(image,), prompt=text if short else None)

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        records = [{k: v for k, v in record.items() if k != "image"} for record in self._records(source)]
        return self.parse_references([Document("mmhal", records)])

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        return [
            {"question_id": place, "question_type": _KINDS[place % len(_KINDS)], **record}
            for place, record in enumerate(records_of(documents, _FIELDS))
        ]

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        items = [_rate(pair) for pair in pairs]
        ratings = [item.facts["rating"] for item in items]
        kinds: dict[str, list[int]] = {}
        for item in items:
            kinds.setdefault(item.facts["question_type"], []).append(item.facts["rating"])
        average, rate = fmean(ratings), fmean(r < _NO_HALLUCINATION for r in ratings)
        informative = fmean(r - 3 if r >= _NO_HALLUCINATION else r for r in ratings)
        return items, {
            "average_score": round(average, 2),
            "average_score_exact": average,
            "hallucination_rate": round(rate, 2),
            "hallucination_rate_exact": rate,
            "per_question_type": {name: fmean(values) for name, values in kinds.items()},
            "informativeness_percent_rlaifv": 100 * informative / 3,
        }

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        ratings = [float(item.facts["rating"]) for item in items]
        return estimate_mean("average_score_exact", ratings, [item.unit for item in items])

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """The official list with ``model_answer`` filled in."""
        write_document(out, [{**p.reference, "model_answer": p.text} for p in pairs], indent=2)
        return {}

    def judge_request(self, pair: Pair) -> JudgeRequest | None:
        """Ask for the rating of a reply that was given."""
        if not pair.answered:
            return None
        reference = pair.reference
        return JudgeRequest(
            key=self.judgement_key(reference),
            instruction=_RUBRIC,
            context={
                "image contents": ", ".join(map(str, reference["image_content"])),
                "question": str(reference["question"]),
                "human answer": str(reference["gt_answer"]),
            },
            candidate=pair.text,
        )

    def _records(self, source: Source) -> list[Record]:
        role = "questions" if source.has("questions") else "template"
        return records_of([read_document(source.path(role))])


_RUBRIC = """You rate a model's response to a question about an image that you cannot see. What the image shows and a
human's answer are given. A hallucination is a claim about the image that they contradict or that cannot follow from
them. Explain briefly, then end with one line "Rating: N", where N is
6: no hallucination, very informative; 5: none, very informative, could say more; 4: none, somewhat informative;
3: none, not informative; 2: hallucination, very informative; 1: hallucination, somewhat informative;
0: hallucination, not informative."""


def rating(reply: str) -> int | None:
    """The rating in a judge's reply; None unless exactly one occurs."""
    reply = reply.lower()
    found = [value for value in range(7) if f"rating: {value}" in reply]
    return found[0] if len(found) == 1 else None


def _rate(pair: Pair) -> Item:
    reference = pair.reference
    read = rating(pair.verdict) if pair.verdict is not None and pair.answered else None
    value = read or 0
    return Item(
        id=reference["question_id"],
        score=float(value >= _NO_HALLUCINATION),
        unit=key(reference["question_id"]),
        parsed=None if read is None else str(read),
        answered=pair.answered,
        unparsed=pair.answered and read is None,
        facts={"rating": value, "question_type": reference["question_type"]},
    )


BENCHMARK = MmHal()
