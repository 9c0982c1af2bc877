"""MMHal-Bench (Sun et al. 2023, arXiv 2309.14525): 96 open questions in eight kinds, rated by a judge from 0 to 6.

Files are RLAIF-V's ``mmhal-bench_with_image.jsonl`` (images in base64) or the official ``response_template.json`` with
the folder of the images. A rating of 3 or more means no hallucination. The rating is read as in the published script
(LLaVA-RLHF, ``summarize_gpt_mmhal.py``): exactly one of "rating: 0" to "rating: 6" must occur in the judge's reply,
otherwise it is 0.

The instruction given to the judge here is this project's own; scores compare with each other for one judge model only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from statistics import fmean

from mmpipe.benchmarks.base import SHORT_ANSWER, AnswerPair, Benchmark, Item, JudgeRequest, Protocol, grouped
from mmpipe.benchmarks.jsonl import Document, JsonDict, read_document, records_of
from mmpipe.benchmarks.readers import BenchmarkFiles, decode_base64
from mmpipe.benchmarks.stats import MetricEstimate, estimate_mean

_KINDS = (
    "attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other",
)  # fmt: skip
_NO_HALLUCINATION = 3
_RUBRIC = """You rate a model's response to a question about an image that you cannot see. What the image shows and a
human's answer are given. A hallucination is a claim about the image that they contradict or that cannot follow from
them. Explain briefly, then end with one line "Rating: N", where N is
6: no hallucination, very informative; 5: none, very informative, could say more; 4: none, somewhat informative;
3: none, not informative; 2: hallucination, very informative; 1: hallucination, somewhat informative;
0: hallucination, not informative."""


class MmHal(Benchmark):
    """MMHal-Bench."""

    name = "mmhal"
    submission = "json"
    indent = 2
    files = {"questions": "mmhal-bench_with_image.jsonl", "template": "response_template.json", "images": "images"}
    fields = ("question", "gt_answer", "image_content")
    prompts = {"llava": "{question}", "short": "{question}" + SHORT_ANSWER}
    recorded = {"short": "{question}"}
    protocols = (
        Protocol("mmhal", "the bare question; rating by a judge", metric="average_score_exact", max_new_tokens=1024,
                 judged=True),
        Protocol("rlaifv", "the same by RLAIF-V's beam search with three beams", metric="average_score_exact",
                 max_new_tokens=1024, num_beams=3, judged=True),
        Protocol("llava_mod", "a short answer asked for, as LLaVA-MoD's script does by default", prompt="short",
                 metric="average_score_exact", max_new_tokens=1024, judged=True),
    )  # fmt: skip

    def images(self, source: BenchmarkFiles, records: Sequence[JsonDict]) -> Iterator[bytes | Path | None]:
        for place, record in enumerate(_records(source)):
            if "image" in record:
                yield decode_base64(str(record["image"]), f"mmhal, record {place}")
            else:
                yield source.image(PurePosixPath(str(record["image_src"])).name)

    def references(self, source: BenchmarkFiles, protocol: Protocol) -> list[JsonDict]:
        records = [{k: v for k, v in record.items() if k != "image"} for record in _records(source)]
        return self.parse_references([Document("mmhal", records)])

    def parse_references(self, documents: Sequence[Document]) -> list[JsonDict]:
        return [
            {"question_id": place, "question_type": _KINDS[place % len(_KINDS)], **record}
            for place, record in enumerate(records_of(documents, self.fields))
        ]

    def item(self, pair: AnswerPair, protocol: Protocol) -> Item:
        read = rating(pair.verdict) if pair.verdict is not None and pair.answered else None
        kind, value = pair.reference["question_type"], read or 0
        parsed = None if read is None else str(read)
        return self.result(pair, value >= _NO_HALLUCINATION, parsed, rating=value, question_type=kind)

    def metrics(self, items: Sequence[Item], pairs: Sequence[AnswerPair], protocol: Protocol) -> JsonDict:
        ratings = [item.facts["rating"] for item in items]
        average, rate = fmean(ratings), fmean(r < _NO_HALLUCINATION for r in ratings)
        informative = fmean(r - 3 if r >= _NO_HALLUCINATION else r for r in ratings)
        kinds = grouped(items, "question_type")
        return {
            "average_score": round(average, 2),
            "average_score_exact": average,
            "hallucination_rate": round(rate, 2),
            "hallucination_rate_exact": rate,
            "per_question_type": {name: fmean(i.facts["rating"] for i in some) for name, some in kinds.items()},
            "informativeness_percent_rlaifv": 100 * informative / 3,
        }

    def estimate(self, items: Sequence[Item], metrics: JsonDict, protocol: Protocol) -> MetricEstimate:
        ratings = [float(item.facts["rating"]) for item in items]
        return estimate_mean(protocol.metric, ratings, [item.unit for item in items])

    def submitted(self, pair: AnswerPair) -> JsonDict:
        """A record of the official list with ``model_answer`` filled in."""
        return {**pair.reference, "model_answer": pair.text}

    def judge_request(self, pair: AnswerPair) -> JudgeRequest | None:
        """The request for the rating of a reply."""
        if not pair.answered:
            return None
        reference = pair.reference
        context = {
            "image contents": ", ".join(map(str, reference["image_content"])),
            "question": str(reference["question"]),
            "human answer": str(reference["gt_answer"]),
        }
        return JudgeRequest(self.judgement_key(reference), _RUBRIC, pair.text, context)


def rating(reply: str) -> int | None:
    """The rating in a judge's reply; None unless exactly one occurs."""
    reply = reply.lower()
    found = [value for value in range(7) if f"rating: {value}" in reply]
    return found[0] if len(found) == 1 else None


def _records(source: BenchmarkFiles) -> list[JsonDict]:
    role = "questions" if source.has("questions") else "template"
    return records_of([read_document(source.path(role))])


BENCHMARK = MmHal()
