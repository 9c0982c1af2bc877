"""MMStar (Chen et al. 2024, arXiv 2403.20330): 1500 multiple-choice questions that need the image, in 6 x 3 abilities.

Files are the official ``mmstar.parquet`` (``index, question, image, answer, category, l2_category, meta_info``); the
question text holds its options. The official rule (``eval/vlmeval/evaluate/mmstar.py``) reads fixed places of the
lower-cased reply: the letter first, in a bracket, after "option " or after "the answer is ". It divides by 250 a
category and by 1500 in all, so an incomplete run scores less; shares of the answered questions are given beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from mmpipe.benchmarks.base import OPTION_LETTER, AnswerPair, Item, Protocol, grouped, mean_score
from mmpipe.benchmarks.jsonl import JsonDict
from mmpipe.benchmarks.multiple_choice import MultipleChoice, extract_letter_lmms
from mmpipe.benchmarks.stats import MetricEstimate, bootstrap_groups

_PER_CATEGORY, _IN_ALL = 250, 1500
_BEFORE_THE_LETTER = ("", "(", "option ", "the answer is ")


def opening_letter(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter that the reply opens with, by the official rule."""
    reply = reply.lower().strip().replace("\n", " ")
    named = (c for c in "ABCD" if any(reply.startswith(before + c.lower()) for before in _BEFORE_THE_LETTER))
    return next(named, None)


class MmStar(MultipleChoice):
    """MMStar."""

    name = "mmstar"
    files = {"questions": "mmstar.parquet"}
    fields = ("index", "question", "answer", "category", "l2_category")
    image = ""
    prompts = {"llava": "{question}" + OPTION_LETTER, "lmms": "{plain}" + OPTION_LETTER.rstrip(".")}
    rules = {"official": opening_letter, "lmms": lambda reply, options: extract_letter_lmms(reply, "ABCD")}
    protocols = (
        Protocol("mmstar", "the official rule", metric="accuracy_by_count", max_new_tokens=32, aliases=("llava",)),
        Protocol("lmms", "lmms-eval: letter extraction by priority, mean of l2 means", rule="lmms", prompt="lmms",
                 metric="average_of_l2_means"),
        Protocol("libmoe", "the official rule, mean of l2 means", prompt="lmms", metric="average_of_l2_means"),
    )  # fmt: skip

    def options(self, reference: JsonDict) -> dict[str, str]:
        return {}  # they are part of the question's text

    def gold(self, reference: JsonDict) -> str:
        return str(reference["answer"]).strip().upper()

    def variables(self, record: JsonDict) -> JsonDict:
        return {**record, "plain": str(record["question"]).strip().replace(" Please answer yes or no.", "")}

    def text(self, record: JsonDict, protocol: Protocol) -> str:
        return super().text(record, protocol).replace("<image 1>", "").lstrip()

    def facts(self, pair: AnswerPair, letter: str | None) -> JsonDict:
        reference = pair.reference
        return {
            "gold": str(reference["answer"]),
            "category": reference["category"],
            "ability": f"{reference['category']}({reference['l2_category']})",
        }

    def metrics(self, items: Sequence[Item], pairs: Sequence[AnswerPair], protocol: Protocol) -> JsonDict:
        categories, abilities = grouped(items, "category"), grouped(items, "ability")
        if protocol.metric != "accuracy_by_count":
            parts = {protocol.metric: items, **categories}
            return {name: fmean(map(mean_score, grouped(some, "ability").values())) for name, some in parts.items()}
        return {
            "official_final_score_over_1500": sum(item.score for item in items) / _IN_ALL,
            "official_category_over_250": {
                name: sum(item.score for item in members) / _PER_CATEGORY for name, members in categories.items()
            },
            "per_l2": {name: mean_score(members) for name, members in abilities.items()},
            "accuracy_by_count": mean_score(items),
            "per_category_by_count": {name: mean_score(members) for name, members in categories.items()},
        }

    def estimate(self, items: Sequence[Item], metrics: JsonDict, protocol: Protocol) -> MetricEstimate:
        if protocol.metric == "accuracy_by_count":
            return super().estimate(items, metrics, protocol)
        return bootstrap_groups(
            protocol.metric,
            list(grouped(items, "ability")),
            ((item.unit, item.facts["ability"], (item.score, 1.0)) for item in items),
            lambda t: (t[..., 0] / t[..., 1]).mean(axis=-1),
            metrics[protocol.metric],
        )


BENCHMARK = MmStar()
