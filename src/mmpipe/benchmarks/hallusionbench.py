"""HallusionBench (Guan et al. 2023, arXiv 2310.14566): pairs of questions about original and edited figures.

Files are the official ``HallusionBench.json`` (1129 rows) and the folder of its images, or the tables of
the hub (role ``parquet``: with and without images in one folder); lmms-eval asks the 951 rows with an
image only. A row is identified by ``category_subcategory_set_figure_question``.

The official verdict is a judge's: "incorrect", "correct" or else unclear. For a question of category VS
without its figure (``figure_id`` 0) unclear is right too. ``aAcc`` counts rows, ``fAcc`` figures with all
rows right (VS without figure left out), ``qAcc`` questions right for all their figures. Two protocols need no
judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from mmpipe.benchmarks.base import Benchmark, Document, Item, Pair, Protocol, Question, Record, Source, key, records_of
from mmpipe.benchmarks.jsonl import read_document, write_document
from mmpipe.benchmarks.judging import JudgeRequest
from mmpipe.benchmarks.readers import hub_images_if_any, hub_records, on_hub
from mmpipe.benchmarks.stats import Estimate, estimate_mean
from mmpipe.benchmarks.yesno import OTHER, yes_in_it, yes_or_no_word
from mmpipe.errors import DataError

_FIELDS = ("category", "subcategory", "set_id", "figure_id", "question_id", "question")
_WRONG, _RIGHT, _UNCLEAR = "incorrect", "correct", "unclear"
_RULES = {"intern": yes_in_it, "yesno": yes_or_no_word}


class HallusionBench(Benchmark):
    """HallusionBench."""

    name = "hallusionbench"
    submission = "json"
    files: ClassVar[Mapping[str, str]] = {
        "questions": "HallusionBench.json",
        "images": "hallusion_bench",
        "parquet": "data",
    }
    protocols = (
        Protocol("hallusionbench", "all rows, judged", rule="judge", judged=True),
        Protocol("lmms", "the rows with an image, judged", rule="judge_images", judged=True, aliases=("libmoe",)),
        Protocol("intern", "lmms-eval's rule without judge: a reply with 'yes' in it is a yes", rule="intern"),
        Protocol("vlmevalkit", "the word yes or no, not both; anything else is wrong", rule="yesno", prompt="yesno"),
    )

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        records = self._all(source)
        images: Iterator[bytes | Path | None] = (
            hub_images_if_any(source) if on_hub(source) else (_image(source, record) for record in records)
        )
        for record, image in zip(records, images, strict=True):
            if not _asked(record, protocol):
                continue
            text = str(record["question"])
            yield Question(
                id=record["key"],
                text=f"{text} Please answer yes or no." if protocol.prompt == "yesno" else text,
                images=() if image is None else (image,),
            )

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        return [record for record in self._all(source) if _asked(record, protocol)]

    def _all(self, source: Source) -> list[Record]:
        if on_hub(source):
            rows = hub_records(source, (*_FIELDS, "gt_answer_details", "gt_answer"), ("visual_input",))
            return self.parse_references([Document(source.files["parquet"], rows)])
        return self.parse_references([read_document(source.path("questions"))])

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        return [
            {"index": place, **record, "key": _row_key(record)}
            for place, record in enumerate(records_of(documents, _FIELDS))
        ]

    def reference_keys(self, reference: Record) -> list[tuple[str, ...]]:
        """By name, by number in the file, or by name with ``visual_input`` as in VLMEvalKit's table."""
        names = [str(reference[name]) for name in _FIELDS[:5]]
        with_input = "_".join([*names[:2], str(reference.get("visual_input")), *names[2:]])
        own = key(reference.get("id", reference["index"]))
        return [(reference["key"],), (own,), (with_input,)]

    def judgement_key(self, reference: Record) -> str:
        return str(reference["key"])

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        if protocol.rule == "judge_images":
            pairs = [pair for pair in pairs if _has_image(pair.reference)]
        items = [_rate(pair, protocol.rule) for pair in pairs]
        scale = 1.0 if protocol.rule == "intern" else 100.0
        drop_unseen = protocol.rule.startswith("judge")
        metrics = {
            "aAcc": scale * fmean(item.score for item in items),
            "qAcc": scale * _all_right(items, "pair"),
            "fAcc": scale * _all_right([i for i in items if not (drop_unseen and i.facts["unseen"])], "figure"),
        }
        if protocol.rule == "yesno":
            metrics["average"] = fmean(metrics.values())
        if protocol.rule.startswith("judge"):
            metrics = {name: round(value, 4) for name, value in metrics.items()} | _by_difficulty(items)
            metrics |= _bias(items)
        return items, metrics

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        scale = 1.0 if protocol.rule == "intern" else 100.0
        return estimate_mean("aAcc", [i.score for i in items], [i.unit for i in items], scale)

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """The official file with the replies in ``model_prediction``."""
        added = ("index", "key")
        write_document(
            out,
            [{k: v for k, v in p.reference.items() if k not in added} | {"model_prediction": p.text} for p in pairs],
        )
        return {}

    def judge_request(self, pair: Pair) -> JudgeRequest | None:
        """Ask whether the reply agrees with the reference answer."""
        reference = pair.reference
        return JudgeRequest(
            key=self.judgement_key(reference),
            instruction=(
                "You grade answers. Compare the prediction with the reference answer to the question. Say 'correct' "
                "if they do not contradict each other, 'incorrect' if they do, 'unclear' if the prediction does not "
                "settle the question. Reply with that one word."
            ),
            context={"question": str(reference["question"]), "reference": str(reference["gt_answer_details"])},
            candidate=pair.text,
            max_tokens=16,
        )


def verdict(reply: str) -> str:
    """What a judge's reply says; "incorrect" is looked for first, because it holds "correct"."""
    reply = reply.lower()
    return _WRONG if _WRONG in reply else _RIGHT if _RIGHT in reply else _UNCLEAR


def _row_key(record: Record) -> str:
    return "_".join(str(record[name]) for name in _FIELDS[:5])


def _asked(record: Record, protocol: Protocol) -> bool:
    return protocol.rule != "judge_images" or _has_image(record)


def _image(source: Source, record: Record) -> Path | None:
    name = record.get("filename")
    return source.image(str(name).removeprefix("./")) if name else None


def _has_image(record: Record) -> bool:
    return str(record.get("visual_input", "1")) != "0"


def _rate(pair: Pair, rule: str) -> Item:
    reference = pair.reference
    unseen = reference["category"] == "VS" and str(reference["figure_id"]) == "0"
    parsed: str | None
    if rule in _RULES:
        if "gt_answer" not in reference:
            raise DataError(
                f"hallusionbench: {reference['key']} has no 'gt_answer', which protocols without judge need"
            )
        parsed = _RULES[rule](pair.text)
        right = parsed == ("yes" if str(reference["gt_answer"]) == "1" else "no")
        unparsed = parsed == OTHER
    else:
        parsed = None if pair.verdict is None else verdict(pair.verdict)
        right = parsed == _RIGHT or (unseen and parsed == _UNCLEAR)
        unparsed = parsed is None
    names = [str(reference[name]) for name in _FIELDS[:5]]
    return Item(
        id=reference["key"],
        score=float(pair.answered and right),
        unit="_".join(names[:4]),
        parsed=parsed if pair.answered else None,
        answered=pair.answered,
        unparsed=pair.answered and unparsed,
        facts={
            "figure": "_".join(names[:4]),
            "pair": "_".join([*names[:3], names[4]]),
            "unseen": unseen,
            "gold": str(reference["gt_answer"]) if "gt_answer" in reference else None,
            "hard": str(reference.get("visual_input")) == "2",
        },
    )


def _all_right(items: Sequence[Item], label: str) -> float:
    """Share of the groups of which every row is right."""
    groups: dict[str, bool] = {}
    for item in items:
        groups[item.facts[label]] = groups.get(item.facts[label], True) and item.score == 1
    return fmean(groups.values()) if groups else 0.0


def _bias(items: Sequence[Item]) -> Record:
    """How much more often yes is said than right (``yes_pct_diff``), and the share of wrong yeses among the wrong answers
    (``fp_ratio``; 0 where none is wrong, where the official script stops). A wrong answer counts as the opposite one.
    """
    if any(item.facts["gold"] is None for item in items):
        return {}
    gold = [item.facts["gold"] == "1" for item in items]
    said = [(item.score == 1) == yes for item, yes in zip(items, gold, strict=True)]
    wrong = [yes for item, yes in zip(items, gold, strict=True) if item.score != 1]
    return {
        "yes_pct_diff": fmean(said) - fmean(gold),
        "fp_ratio": sum(not yes for yes in wrong) / len(wrong) if wrong else 0.0,
    }


def _by_difficulty(items: Sequence[Item]) -> Record:
    """qAcc of the rows about original figures (easy) and about edited ones (hard)."""
    return {
        f"{name}_qAcc": round(100 * _all_right(members, "pair"), 4)
        for name, members in (
            ("easy", [item for item in items if not item.facts["hard"]]),
            ("hard", [item for item in items if item.facts["hard"]]),
        )
    }


BENCHMARK = HallusionBench()
