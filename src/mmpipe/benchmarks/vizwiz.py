"""VizWiz-VQA (Gurari et al. 2018, arXiv 1802.08218): questions of blind people about their photographs.

Files are the official ``val.json`` or ``test.json`` (a list of ``image, question, answers``) and the folder of the
images. A question's id is its place in the list, as in LLaVA's question file (role ``prompts``); the image's name is
accepted too, and is the id in the table on the hub (role ``parquet``). The test split has no public answers: its
submission file goes to EvalAI.

The official scorer (VizWiz API, ``vqaEval.py``) normalises the prediction but never the human answers. Its table of
contractions is written with typographic apostrophes but for a few entries, so most contractions it restores equal no
human answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mmpipe.benchmarks.base import SHORT_ANSWER, AnswerPair, Item, Protocol
from mmpipe.benchmarks.jsonl import JsonDict, key
from mmpipe.benchmarks.readers import BenchmarkFiles
from mmpipe.benchmarks.short_answer import (
    CONTRACTIONS,
    HumanAnswers,
    drop_articles,
    drop_punctuation,
    evalai_normal,
    one_line,
    soft_accuracy,
)
from mmpipe.errors import DataError

_INSTRUCTION = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_ANSWER

# The entries of the official table that have plain apostrophes in their value, and in their key.
_PLAIN_VALUES = frozenset(["ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"])
_PLAIN_KEYS = frozenset(("couldn'tve", "hadn'tve"))
_CONTRACTIONS = {
    spelt if spelt in _PLAIN_KEYS else spelt.replace("'", "’"): full
    if full in _PLAIN_VALUES
    else full.replace("'", "’")
    for spelt, full in CONTRACTIONS.items()
}


def vizwiz_api(reply: str, humans: Sequence[str]) -> tuple[str, float]:
    """The rule of the VizWiz API."""
    prediction = drop_articles(drop_punctuation(one_line(reply)), _CONTRACTIONS)
    return prediction, soft_accuracy(prediction, humans)


class VizWiz(HumanAnswers):
    """VizWiz-VQA."""

    name = "vizwiz"
    files = {"questions": "val.json", "images": "val", "prompts": "llava_test.jsonl", "parquet": "data"}
    fields = ("image", "question")
    hub_columns = ("question_id", "question", "answers")
    hub_optional = ("category",)
    shown = ("image",)
    unit_field = "image"
    prompts = {"llava": "{question}" + _INSTRUCTION, "lmms": "{capitalised}" + _INSTRUCTION}
    rules = {
        **HumanAnswers.rules,
        "raw": vizwiz_api,
        "uploaded": lambda reply, humans: vizwiz_api(evalai_normal(reply), humans),
    }
    protocols = (
        Protocol("vizwiz_val", "the VizWiz API on answers normalised for upload, as LLaVA converts them",
                 rule="uploaded", metric="overall", scale=100, digits=4, aliases=("llava",)),
        Protocol("raw", "the VizWiz API on the replies as they are", rule="raw", metric="overall", scale=100, digits=4),
        Protocol("lmms", "lmms-eval: both sides normalised, question capitalised", rule="evalai", prompt="lmms",
                 metric="exact_match"),
        Protocol("m4c", "both sides normalised by MMF's m4c evaluator", rule="evalai", scale=100),
    )  # fmt: skip

    def references(self, source: BenchmarkFiles, protocol: Protocol) -> list[JsonDict]:
        """The hub's ids are the images' names, with or without extension."""
        if not source.on_hub:
            return super().references(source, protocol)
        records = []
        for row in source.hub_rows(self.hub_columns, self.hub_optional):
            stem = PurePosixPath(str(row["question_id"])).stem
            kind = {"answer_type": row["category"]} if "category" in row else {}
            asked = {name: row[name] for name in ("question", "answers")}
            records.append({**kind, "question_id": stem, "image": f"{stem}.jpg", **asked})
        return records

    def reference_keys(self, reference: JsonDict) -> list[tuple[str, ...]]:
        name = str(reference["image"])
        return [(key(reference["question_id"]),), (name,), (PurePosixPath(name).stem,)]

    def metrics(self, items: Sequence[Item], pairs: Sequence[AnswerPair], protocol: Protocol) -> JsonDict:
        metrics = super().metrics(items, pairs, protocol)
        if protocol.metric == "overall" and all("answerable" in pair.reference for pair in pairs):
            metrics["unanswerability"] = _unanswerability(pairs, items)
        return metrics

    def convert(self, pairs: Sequence[AnswerPair], out: Path) -> JsonDict:
        """The list EvalAI accepts. Raises DataError when an answer is missing, which the server would not accept."""
        missing = [str(pair.reference["image"]) for pair in pairs if not pair.answered]
        if missing:
            raise DataError(f"vizwiz: {len(missing)} images have no answer, e.g. {', '.join(missing[:5])}")
        return super().convert(pairs, out)

    def submitted(self, pair: AnswerPair) -> JsonDict:
        return {"image": pair.reference["image"], "answer": evalai_normal(pair.text)}


def _unanswerability(pairs: Sequence[AnswerPair], items: Sequence[Item]) -> JsonDict:
    """Finding the questions that cannot be answered, from the answers "unanswerable" (percent, 4 decimals)."""
    gold = [not int(pair.reference["answerable"]) for pair in pairs]
    said = [item.parsed == "unanswerable" for item in items]
    hits = sum(g and s for g, s in zip(gold, said, strict=True))
    positives, named = sum(gold), sum(said)
    recall = hits / positives if positives else 0.0
    precision = hits / named if named else 0.0
    average = recall * precision + (1 - recall) * positives / len(gold)
    f1 = 2 * hits / (positives + named) if positives + named else 0.0
    return {"average_precision": round(100 * average, 4), "f1_score": round(100 * f1, 4)}


BENCHMARK = VizWiz()
