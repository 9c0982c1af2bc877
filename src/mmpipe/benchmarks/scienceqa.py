"""ScienceQA (Lu et al. 2022, arXiv 2209.09513): school science with two to five options, half with an image.

Files are the official ``problems.json`` and ``pid_splits.json`` (the test split), the images below ``test/<id>/``, and
LLaVA's ``llava_test_CQM-A.json`` if its prompts are wanted word for word; or a table of the hub (role ``parquet``),
which has no ids, so that questions are numbered by place. A question without image is asked as text.

The official rule is LLaVA's ``eval_science_qa.py``, which counts a question as one with an image when ``<image>``
is in the *answer's* prompt; so a question without answer is wrong, and not counted among those with an image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmpipe.benchmarks.base import OPTION_LETTER, AnswerPair, Item, Protocol, Question, estimate_score, mean_score
from mmpipe.benchmarks.jsonl import Document, JsonDict, key, numbered, read_document, records_of, require
from mmpipe.benchmarks.multiple_choice import LETTERS, MultipleChoice
from mmpipe.benchmarks.readers import BenchmarkFiles
from mmpipe.benchmarks.stats import MetricEstimate
from mmpipe.errors import DataError

_MARK = "<image>"
_OPTIONS = "ABCDE"
_PROMPT = "{context}{question}\n{options}" + OPTION_LETTER
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")  # any character may follow, as in the original


def letter_llava(reply: str, options: Mapping[str, str]) -> str | None:
    """LLaVA's rule: a letter alone, "X. ...", or a single "The answer is X" followed by anything."""
    if reply in tuple(_OPTIONS):
        return reply
    if len(reply) >= 3 and reply[0] in _OPTIONS and reply[1:3] == ". ":
        return reply[0]
    found = _ANSWER_IS.findall(reply)
    return found[0] if len(found) == 1 else None


def letter_lmms(reply: str, options: Mapping[str, str]) -> str | None:
    """lmms-eval's rule: a letter in either case, or "X." at the beginning."""
    reply = reply.strip()
    if len(reply) == 1:
        return reply.upper()
    return reply[0] if len(reply) >= 2 and reply[0].isupper() and reply[0].isascii() and reply[1] == "." else None


def letter_libmoe(reply: str, options: Mapping[str, str]) -> str | None:
    """The same in LibMoE's copy of lmms-eval: capital letters only."""
    letter = letter_lmms(reply, options)
    return letter if letter is None or letter == reply.strip()[0] else None


class ScienceQa(MultipleChoice):
    """ScienceQA's test split."""

    name = "scienceqa"
    submission = "json"
    indent = 2
    files = {
        "questions": "problems.json",
        "splits": "pid_splits.json",
        "images": "test",
        "prompts": "llava_test_CQM-A.json",
        "parquet": "ScienceQA-FULL",
    }
    reference_roles = ("questions", "splits")
    images_optional = True
    image_mark = f"{_MARK}\n"
    hub_columns = ("question", "choices", "answer")
    hub_optional = ("hint", "subject", "grade")
    prompts = {"llava": _PROMPT, "lmms": _PROMPT}
    rules = {"official": letter_llava, "lmms": letter_lmms, "libmoe": letter_libmoe}
    protocols = (
        Protocol("llava", "LLaVA's eval_science_qa", metric="img_accuracy", max_new_tokens=1024),
        Protocol("lmms", "lmms-eval: a letter in either case", rule="lmms", prompt="lmms", metric="exact_match",
                 max_new_tokens=16),
        Protocol("libmoe", "LibMoE's copy of it: capital letters only", rule="libmoe", prompt="lmms",
                 metric="exact_match", max_new_tokens=16),
    )  # fmt: skip

    def llava_questions(self, source: BenchmarkFiles, protocol: Protocol, role: str = "prompts") -> Iterator[Question]:
        """The texts of LLaVA's question file, without its image mark, by question id."""
        prompts = records_of([read_document(source.path(role))], ("id", "conversations"))
        given = {key(r["id"]): str(r["conversations"][0]["value"]).replace(_MARK, "").strip() for r in prompts}
        given = {number: text + OPTION_LETTER for number, text in given.items()}
        records = self.references(source, protocol)
        texts = (given.get(key(record["question_id"])) or self.text(record, protocol) for record in records)
        yield from self.ask(source, protocol, records, texts)

    def image_name(self, record: JsonDict) -> str | None:
        return f"{key(record['question_id'])}/{record['image']}" if record.get("image") else None

    def parse_references(self, documents: Sequence[Document]) -> list[JsonDict]:
        """``problems.json`` with ``pid_splits.json`` (or ``{"problems", "test" or "test_ids"}``), or records."""
        problems: dict[str, JsonDict] = {}
        wanted: list[Any] | None = None
        records: list[JsonDict] = []
        for document in documents:
            content = document.content
            if isinstance(content, list):
                records += numbered(records_of([document], ("choices", "answer")))
                continue
            if not isinstance(content, dict):
                raise DataError(f"{document.name}: neither problems, splits nor records")
            ids = next((content[name] for name in ("test", "test_ids", "split") if name in content), None)
            wanted = wanted if ids is None else (ids["test"] if isinstance(ids, dict) else ids)
            problems |= content.get("problems", {} if ids is not None else content)
        if problems and wanted is None:
            wanted = [number for number, problem in problems.items() if problem.get("split", "test") == "test"]
        absent = [number for number in wanted or [] if key(number) not in problems]
        if absent:
            raise DataError(f"scienceqa: the problems lack the ids {absent[:5]} of the split")
        for number in wanted or []:
            require(problems[key(number)], ("choices", "answer"), f"scienceqa, problem {number}")
            records.append({"question_id": number, **problems[key(number)]})
        return records

    def options(self, reference: JsonDict) -> dict[str, str]:
        return dict(zip(_OPTIONS, reference["choices"], strict=False))

    def gold(self, reference: JsonDict) -> str:
        return LETTERS[int(reference["answer"])]

    def variables(self, record: JsonDict) -> JsonDict:
        return super().variables(record) | {"context": f"Context: {record['hint']}\n" if record.get("hint") else ""}

    def facts(self, pair: AnswerPair, letter: str | None) -> JsonDict:
        chosen = letter if letter in self.options(pair.reference) else None
        return {
            "predicted_index": _OPTIONS.index(chosen) if chosen else -1,
            "gold": self.gold(pair.reference),
            "is_multimodal": pair.answer is not None and _MARK in str(pair.answer.get("prompt", "")),
        }

    def metrics(self, items: Sequence[Item], pairs: Sequence[AnswerPair], protocol: Protocol) -> JsonDict:
        if protocol.metric == "exact_match":
            return {"exact_match": mean_score(items), "n": len(items)}
        imaged = [item for item in items if item.facts["is_multimodal"]]
        correct = int(sum(item.score for item in items))
        return {
            "accuracy": 100 * correct / len(items),
            "correct": correct,
            "count": len(items),
            "img_accuracy": 100 * mean_score(imaged) if imaged else 0.0,
            "img_count": len(imaged),
        }

    def estimate(self, items: Sequence[Item], metrics: JsonDict, protocol: Protocol) -> MetricEstimate:
        """The questions with an image (SQA-IMG), if any; all by lmms-eval's rule."""
        if protocol.metric == "exact_match":
            return super().estimate(items, metrics, protocol)
        imaged = [item for item in items if item.facts["is_multimodal"]]
        return estimate_score("img_accuracy" if imaged else "accuracy", imaged or items, 100)

    def document(self, pairs: Sequence[AnswerPair]) -> JsonDict:
        """LLaVA's result file: ``acc``, ``correct``, ``count``, ``results`` (option numbers) and ``outputs``."""
        items, metrics = self.rate(pairs, self.protocol())
        keys = [key(item.id) for item in items]
        return {
            "acc": metrics["accuracy"],
            "correct": metrics["correct"],
            "count": len(items),
            "results": {k: item.facts["predicted_index"] for k, item in zip(keys, items, strict=True)},
            "outputs": {k: pair.text if pair.answered else "FAILED" for k, pair in zip(keys, pairs, strict=True)},
        }


BENCHMARK = ScienceQa()
