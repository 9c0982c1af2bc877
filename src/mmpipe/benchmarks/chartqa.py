"""ChartQA (Masry et al. 2022, arXiv 2203.10244): questions about charts, numbers right within five percent.

Files are the official ``test_human.json`` and ``test_augmented.json`` (``imgname, query, label``) with the folder
``png``, or the parquet files of the copy on the hub (``type, question, answer, image``).

The rule is lmms-eval's (``tasks/chartqa/utils.py``). A number is what Python reads as one, with a final ``%`` divided
by 100; there is a tolerance only if both sides are numbers and the right one is not zero, otherwise the lower-cased
texts must be equal. So 2008 passes for 1999, "5" does not for "5%", nor "0.0" for "0", nor "1,000" for "1000".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from mmpipe.benchmarks.base import SHORT_ANSWER, AnswerPair, Item, Protocol, grouped, mean_score
from mmpipe.benchmarks.jsonl import Document, JsonDict, numbered, records_of
from mmpipe.benchmarks.short_answer import ShortAnswer
from mmpipe.errors import DataError

_TOLERANCE = 0.05


def number(text: str) -> float | None:
    """The number a text stands for, percents as fractions.

    >>> number("5%"), number("five")
    (0.05, None)
    """
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(reply: str, gold: str) -> bool:
    """ChartQA's relaxed correctness."""
    said, right = number(reply), number(gold)
    if said is not None and right:
        return abs(said - right) / abs(right) <= _TOLERANCE
    return reply.lower() == gold.lower()


class ChartQa(ShortAnswer):
    """ChartQA's test split."""

    name = "chartqa"
    files = {"human": "test_human.json", "augmented": "test_augmented.json", "images": "png", "parquet": "data"}
    reference_roles = ("human", "augmented")
    hub_columns = ("type", "question", "answer")
    image = "{imgname}"
    unit_field = "imgname"
    prompts = {
        "llava": "{question}\nAnswer the question with a single word.",
        "vlmevalkit": "{question}" + SHORT_ANSWER,
    }
    rules = {
        "official": lambda reply, gold: (reply.strip(), relaxed_match(reply.strip(), gold)),
        "qwen": lambda reply, gold: (reply.strip(), relaxed_match(gold, reply.strip())),
    }
    protocols = (
        Protocol("chartqa", "relaxed accuracy as in lmms-eval", metric="relaxed_overall", max_new_tokens=16,
                 aliases=("lmms", "libmoe", "llava")),
        Protocol("qwen", "Qwen-VL's evaluator, whose tolerance is relative to the reply", rule="qwen",
                 metric="relaxed_overall", max_new_tokens=16),
        Protocol("vlmevalkit", "VLMEvalKit: the same rule; the prompt asks for a word or phrase", prompt="vlmevalkit",
                 metric="relaxed_overall", max_new_tokens=2048),
    )  # fmt: skip

    def parse_references(self, documents: Sequence[Document]) -> list[JsonDict]:
        found = [_reference(record, document.name) for document in documents for record in records_of([document])]
        return numbered(found)

    def facts(self, reference: JsonDict) -> JsonDict:
        return {"gold": reference["answer"], "split": reference["type"].removesuffix("_test")}

    def metrics(self, items: Sequence[Item], pairs: Sequence[AnswerPair], protocol: Protocol) -> JsonDict:
        splits = grouped(items, "split")
        parts = {"overall": items} | {
            f"{name}_split": splits[name] for name in ("human", "augmented") if name in splits
        }
        return {f"relaxed_{name}": mean_score(some) for name, some in parts.items()}


def _reference(record: JsonDict, where: str) -> JsonDict:
    """A record with ``question``, ``answer`` and ``type``, from the names of any copy."""
    question, answer = record.get("question", record.get("query")), record.get("answer", record.get("label"))
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if question is None or answer is None or isinstance(answer, list):
        raise DataError(f"{where}: a record needs 'question' and one 'answer' (or 'query' and 'label')")
    kind = str(record.get("type", record.get("human_or_machine", PurePosixPath(where).stem)))
    split = "human" if "human" in kind or kind == "0" else "augmented"
    known: JsonDict = {name: record[name] for name in ("question_id", "id", "index", "imgname") if name in record}
    return {**known, "question": question, "answer": str(answer), "type": f"{split}_test"}


BENCHMARK = ChartQa()
