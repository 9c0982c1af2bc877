"""HallusionBench (Guan et al. 2023, arXiv 2310.14566): pairs of questions about original and edited figures.

Files are the official ``HallusionBench.json`` (1129 rows) and the folder of its images, or the tables of the hub (role
``parquet``: with and without images in one folder); lmms-eval asks the 951 rows with an image only. A row is identified
by ``category_subcategory_set_figure_question``.

The official verdict (``utils.py`` of tianyi-lab/HallusionBench) is a judge's: "incorrect", "correct" or else unclear.
For a question of category VS without its figure (``figure_id`` 0) unclear is right too. ``aAcc`` counts rows, ``fAcc``
figures with all rows right (VS without figure left out), ``qAcc`` questions right for all their figures. Two protocols
need no judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from mmpipe.benchmarks.base import AnswerPair, Item, JudgeRequest, Protocol, Question, grouped, mean_score
from mmpipe.benchmarks.jsonl import Document, JsonDict, key, records_of
from mmpipe.benchmarks.readers import BenchmarkFiles
from mmpipe.benchmarks.yes_no import OTHER, YesNo, yes_in_it, yes_or_no_word
from mmpipe.errors import DataError

_FIELDS = ("category", "subcategory", "set_id", "figure_id", "question_id", "question")
_INSTRUCTION = (
    "You grade answers. Compare the prediction with the reference answer to the question. Say 'correct' if they do not "
    "contradict each other, 'incorrect' if they do, 'unclear' if the prediction does not settle the question. Reply "
    "with that one word."
)
_WRONG, _RIGHT, _UNCLEAR = "incorrect", "correct", "unclear"


class HallusionBench(YesNo):
    """HallusionBench."""

    name = "hallusionbench"
    submission = "json"
    files = {"questions": "HallusionBench.json", "images": "hallusion_bench", "parquet": "data"}
    fields = _FIELDS
    hub_columns = (*_FIELDS, "gt_answer_details", "gt_answer")
    hub_optional = ("visual_input",)
    images_optional = True
    id_field = "key"
    carried = ()
    prompts = {"llava": "{question}", "yesno": "{question} Please answer yes or no."}
    rules = {"intern": yes_in_it, "yesno": yes_or_no_word}
    protocols = (
        Protocol("hallusionbench", "all rows, judged", rule="judge", metric="aAcc", scale=100, judged=True),
        Protocol("lmms", "the rows with an image, judged", rule="judge_images", metric="aAcc", scale=100, judged=True,
                 aliases=("libmoe",)),
        Protocol("intern", "lmms-eval's rule without judge: a reply with 'yes' in it is a yes", rule="intern",
                 metric="aAcc"),
        Protocol("vlmevalkit", "the word yes or no, not both; anything else is wrong", rule="yesno", prompt="yesno",
                 metric="aAcc", scale=100),
    )  # fmt: skip

    def questions(self, source: BenchmarkFiles, protocol: Protocol) -> Iterator[Question]:
        records = super().references(source, protocol)
        asked = self.ask(source, protocol, records, (self.text(record, protocol) for record in records))
        yield from (question for question, record in zip(asked, records, strict=True) if _asked(record, protocol))

    def image_name(self, record: JsonDict) -> str | None:
        return str(record["filename"]).removeprefix("./") if record.get("filename") else None

    def references(self, source: BenchmarkFiles, protocol: Protocol) -> list[JsonDict]:
        return [record for record in super().references(source, protocol) if _asked(record, protocol)]

    def parse_references(self, documents: Sequence[Document]) -> list[JsonDict]:
        records = records_of(documents, self.fields)
        return [{"index": place, **r, "key": "_".join(_names(r))} for place, r in enumerate(records)]

    def reference_keys(self, reference: JsonDict) -> list[tuple[str, ...]]:
        """By name, by number in the file, or by name with ``visual_input`` as in VLMEvalKit's table."""
        names = _names(reference)
        with_input = "_".join([*names[:2], str(reference.get("visual_input")), *names[2:]])
        own = key(reference.get("id", reference["index"]))
        return [(reference["key"],), (own,), (with_input,)]

    def unit_of(self, reference: JsonDict) -> str:
        return "_".join(_names(reference)[:4])  # the figure

    def gold(self, reference: JsonDict) -> str:
        if "gt_answer" not in reference:
            raise DataError(f"{self.name}: {reference['key']} has no 'gt_answer', which protocols without judge need")
        return "yes" if str(reference["gt_answer"]) == "1" else "no"

    def facts(self, reference: JsonDict) -> JsonDict:
        names = _names(reference)
        return {
            "figure": self.unit_of(reference),
            "pair": "_".join([*names[:3], names[4]]),
            "unseen": reference["category"] == "VS" and str(reference["figure_id"]) == "0",
            "gold": str(reference["gt_answer"]) if "gt_answer" in reference else None,
            "hard": str(reference.get("visual_input")) == "2",
        }

    def item(self, pair: AnswerPair, protocol: Protocol) -> Item:
        facts = self.facts(pair.reference)
        if protocol.rule in self.rules:
            parsed: str | None = self.rules[protocol.rule](pair.text)
            right, unparsed = parsed == self.gold(pair.reference), parsed == OTHER
        else:
            parsed = None if pair.verdict is None else verdict(pair.verdict)
            right, unparsed = parsed == _RIGHT or (facts["unseen"] and parsed == _UNCLEAR), parsed is None
        return self.result(pair, right, parsed, unparsed, **facts)

    def rate(self, pairs: Sequence[AnswerPair], protocol: Protocol) -> tuple[list[Item], JsonDict]:
        return super().rate([pair for pair in pairs if _asked(pair.reference, protocol)], protocol)

    def metrics(self, items: Sequence[Item], pairs: Sequence[AnswerPair], protocol: Protocol) -> JsonDict:
        seen = [item for item in items if not (protocol.judged and item.facts["unseen"])]
        metrics = {
            "aAcc": protocol.scale * mean_score(items),
            "qAcc": protocol.scale * _all_right(items, "pair"),
            "fAcc": protocol.scale * _all_right(seen, "figure"),
        }
        if protocol.rule == "yesno":
            metrics["average"] = fmean(metrics.values())
        if not protocol.judged:
            return metrics
        for name, hard in (("easy_qAcc", False), ("hard_qAcc", True)):  # original figures, edited ones
            metrics[name] = 100 * _all_right([item for item in items if item.facts["hard"] == hard], "pair")
        return {name: round(value, 4) for name, value in metrics.items()} | _bias(items)

    def submitted(self, pair: AnswerPair) -> JsonDict:
        """A record of the official file with the reply in ``model_prediction``."""
        official = {name: value for name, value in pair.reference.items() if name not in ("index", "key")}
        return official | {"model_prediction": pair.text}

    def judge_request(self, pair: AnswerPair) -> JudgeRequest | None:
        """The request whether the reply agrees with the reference answer."""
        reference = pair.reference
        context = {"question": str(reference["question"]), "reference": str(reference["gt_answer_details"])}
        return JudgeRequest(self.judgement_key(reference), _INSTRUCTION, pair.text, context, max_tokens=16)


def verdict(reply: str) -> str:
    """The verdict in a judge's reply; "incorrect" is looked for first, because it holds "correct"."""
    reply = reply.lower()
    return _WRONG if _WRONG in reply else _RIGHT if _RIGHT in reply else _UNCLEAR


def _names(record: JsonDict) -> list[str]:
    return [str(record[name]) for name in _FIELDS[:5]]


def _asked(record: JsonDict, protocol: Protocol) -> bool:
    """Whether the protocol has this row: with ``judge_images`` those with an image."""
    return protocol.rule != "judge_images" or str(record.get("visual_input", "1")) != "0"


def _all_right(items: Sequence[Item], label: str) -> float:
    """Share of the groups of which every row is right."""
    groups = grouped(items, label).values()
    return fmean(all(item.score == 1 for item in members) for members in groups) if groups else 0.0


def _bias(items: Sequence[Item]) -> JsonDict:
    """The excess of yes answers over the labels (``yes_pct_diff``), and the share of wrong yeses among the wrong
    answers (``fp_ratio``; 0 where none is wrong, where the official script stops). A wrong answer counts as the
    opposite one."""
    if any(item.facts["gold"] is None for item in items):
        return {}
    gold = [item.facts["gold"] == "1" for item in items]
    said = [(item.score == 1) == yes for item, yes in zip(items, gold, strict=True)]
    wrong = [yes for item, yes in zip(items, gold, strict=True) if item.score != 1]
    return {
        "yes_pct_diff": fmean(said) - fmean(gold),
        "fp_ratio": sum(not yes for yes in wrong) / len(wrong) if wrong else 0.0,
    }


BENCHMARK = HallusionBench()
