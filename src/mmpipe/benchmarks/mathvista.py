"""MathVista (Lu et al. 2023, arXiv 2310.02255): mathematics in images, multiple choice and free form.

Files are the official ``testmini.json`` (``{pid: record}``) with its images, or the parquet file of the hub
(``decoded_image`` holds the image). An answer is extracted from the reply, normalised by the question's type and
compared as text (lupantech/MathVista, ``evaluation/extract_answer.py`` and ``calculate_score.py``). Where the type
alone does not settle it, a judge extracts; the published numbers need that judge.

A multiple-choice extraction that is no option becomes the nearest option by edit distance, even an empty one. A float
is rounded to the question's precision; lmms-eval passes that precision as a float, which Python's ``round`` refuses, so
that by its rule every float question is wrong (protocol ``libmoe``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mmpipe.benchmarks.base import OPTION_LETTER, SHORT_ANSWER, AnswerPair, Benchmark, Item, JudgeRequest, Protocol
from mmpipe.benchmarks.jsonl import JsonDict, key
from mmpipe.benchmarks.multiple_choice import LETTERS, infer_option, options_block

_FIELDS = ("pid", "question_type", "answer_type", "answer")
_CHOICE = "multi_choice"
_QUOTED = re.compile(r'The answer is "(.*)"\.')
_BRACKETED = re.compile(r"\(([a-zA-Z])\)")
_KINDS: dict[str, type] = {"integer": int, "float": float}
# by type of the answer: what the official hint asks for, how it calls it, its examples; what the short prompt asks for
_ASKED = {
    "integer": ("an integer answer", "value", "1, 2, 3", "a single integer number"),
    "list": ("a Python list as an answer", "list", "[1, 2, 3], [1.2, 1.3, 1.4]", "a Python list"),
}
_GROUPS = ("question_type", "answer_type", "category", "task", "context", "grade", "language", "source", "skills")


class MathVista(Benchmark):
    """MathVista's testmini split."""

    name = "mathvista"
    submission = "json"
    indent = 2
    files = {"questions": "testmini.json", "images": ".", "parquet": "data"}
    fields = _FIELDS
    listed_by = "pid"
    hub_columns = (*_FIELDS, "question", "choices", "query")
    hub_optional = ("unit", "precision", "metadata")
    image_column = "decoded_image"
    protocols = (
        Protocol("mathvista", "the official scorer with a judge's extraction", prompt="query", max_new_tokens=1024,
                 judged=True),
        Protocol("lmms", "lmms-eval, short prompt, precision as it should be", rule="lmms", prompt="format",
                 scale=100, digits=2, max_new_tokens=1024, judged=True),
        Protocol("lmms_cot", "the same, reasoning asked for first", rule="lmms", prompt="reason-first",
                 scale=100, digits=2, max_new_tokens=16384, judged=True),
        Protocol("lmms_solution", "the same, solution asked for", rule="lmms", prompt="solution",
                 scale=100, digits=2, max_new_tokens=16384, judged=True),
        Protocol("libmoe", "lmms-eval as LibMoE ran it: float questions are always wrong", rule="libmoe",
                 prompt="format", scale=100, digits=2, max_new_tokens=1024, judged=True),
        Protocol("vlmevalkit", "VLMEvalKit's check before any judge", rule="prefetch", prompt="query",
                 max_new_tokens=1024),
    )  # fmt: skip

    def text(self, record: JsonDict, protocol: Protocol) -> str:
        return prompt(record, protocol.prompt)

    def item(self, pair: AnswerPair, protocol: Protocol) -> Item:
        if protocol.rule == "prefetch":
            return self._prefetched(pair)
        extraction, from_judge = _extraction(pair)
        prediction = normalise(extraction, pair.reference, precision_as_float=protocol.rule == "libmoe")
        gold = str(pair.reference["answer"])
        right = prediction == gold
        if protocol.rule != "official" and prediction is not None:
            right = prediction.strip() == gold.strip()
        unread = prediction is None or (from_judge and pair.verdict is None)
        return self.result(pair, right, prediction, unread, extraction=extraction, gold=gold)

    def metrics(self, items: Sequence[Item], pairs: Sequence[AnswerPair], protocol: Protocol) -> JsonDict:
        if protocol.rule != "official":
            return super().metrics(items, pairs, protocol)
        return {**_tally(items), **_breakdown(pairs, items)}

    def document(self, pairs: Sequence[AnswerPair]) -> JsonDict:
        """The official output file ``{pid: record}`` with the replies in ``response``, for its extraction and scoring
        scripts."""
        records = [{**pair.reference, "response": pair.text} for pair in pairs]
        return {key(r["pid"]): {k: v for k, v in r.items() if k != "question_id"} for r in records}

    def judge_request(self, pair: AnswerPair) -> JudgeRequest | None:
        """The request to extract the answer from the reply, unless the type of the question settles it."""
        if not pair.answered or settled(pair.text, pair.reference) is not None:
            return None
        reference = pair.reference
        wanted = "the option's letter" if reference["question_type"] == _CHOICE else f"the {reference['answer_type']}"
        instruction = (
            f"You extract answers. Give {wanted} that the response arrives at, and nothing else: no words, no unit, no "
            "explanation. A list is written as [1, 2]. If there is no answer, reply with an empty line."
        )
        context = {"question": prompt(reference, "query")}
        return JudgeRequest(self.judgement_key(reference), instruction, pair.text, context, max_tokens=64)

    def _prefetched(self, pair: AnswerPair) -> Item:
        """VLMEvalKit's check of the raw reply; zero counts as nothing found, as there."""
        question, gold = pair.reference, pair.reference["answer"]
        found: Any = None
        if question["question_type"] == _CHOICE:
            choices = [str(choice) for choice in question["choices"]]
            found = infer_option(pair.text, dict(zip(LETTERS, choices, strict=False)))
            gold = LETTERS[choices.index(str(gold))]
        elif question["answer_type"] in _KINDS:
            with suppress(ValueError):
                found, gold = (_KINDS[question["answer_type"]](text) for text in (pair.text, gold))
        parsed = None if found is None else str(found)
        return self.result(pair, bool(found) and found == gold, parsed, gold=str(question["answer"]))


def settled(reply: str, question: JsonDict) -> str | None:
    """The extraction without judge: an empty reply, a choice word for word, a number of the right type."""
    if reply == "" or (question["question_type"] == _CHOICE and reply in (question.get("choices") or ())):
        return reply
    try:
        return str(_KINDS[question["answer_type"]](reply))
    except (KeyError, ValueError):
        return None


def normalise(extraction: str, question: JsonDict, precision_as_float: bool = False) -> str | None:
    """The extraction in the form of the question's answer; None where it has no such form."""
    if question["question_type"] == _CHOICE:
        choices = [str(choice) for choice in question["choices"]]
        text = extraction.strip()
        bracketed = _BRACKETED.search(text)
        text = bracketed.group(1).upper() if bracketed else text
        if len(text) == 1 and text in LETTERS[: len(choices)]:
            return choices[LETTERS.index(text)]
        return min(choices, key=lambda choice: edit_distance(text, choice))
    try:
        if question["answer_type"] == "integer":
            return str(int(float(extraction)))
        if question["answer_type"] == "float":
            if precision_as_float:
                return None
            return str(round(float(extraction), int(question["precision"])))
    except (ValueError, OverflowError, TypeError):
        return None
    return extraction


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def prompt(question: JsonDict, layout: str) -> str:
    """The text of a question: the official ``query``, or one of lmms-eval's layouts."""
    if layout == "query":
        return str(question["query"])
    unit = f" (Unit: {question['unit']})" if question.get("unit") else ""
    stem = f"{question['question']}{unit}"
    choices, kind = question.get("choices") or (), question["answer_type"]
    if layout == "format":
        block = f"\n{options_block(choices)}" if choices else ""
        if question["question_type"] == _CHOICE:
            return stem + block + OPTION_LETTER
        short = f"\nAnswer the question using {_asked(question)[3]}." if kind in (*_ASKED, "float") else SHORT_ANSWER
        return stem + block + short
    listed = "".join(f"\n({letter}) {c}" for letter, c in zip(LETTERS, choices, strict=False))
    block = f"\nChoices:{listed}" if choices else ""
    if question["question_type"] == _CHOICE:
        wanted = "answer the question and provide the correct option letter, e.g., A, B, C, D, at the end"
    else:
        what, name, examples, _ = _asked(question)
        wanted = f"answer the question requiring {what} and provide the final {name}, e.g., {examples}, at the end"
    if layout == "reason-first":
        act = "select the question from the choices" if choices else wanted
        lead = f"First perform reasoning, then finally {act} in the following format: Answer: xxx."
        return f"{lead}\nQuestion: {stem}{block}"
    return f"Question: {stem}{block}\nHint: Please {wanted}." + ("\nSolution:" if layout == "solution" else "")


def _asked(question: JsonDict) -> tuple[str, str, str, str]:
    """The entry of ``_ASKED``; a number with the question's decimals where there is none."""
    if question["answer_type"] in _ASKED:
        return _ASKED[question["answer_type"]]
    places = int(question["precision"])
    decimals = {1: "one decimal place", 2: "two decimal places"}.get(places, f"{places} decimal places")
    values = (1.23, 1.34, 1.45) if places == 2 else (1.2, 1.3, 1.4)
    number = f"floating-point number with {decimals}"
    return f"a {number}", "value", ", ".join(f"{value:.{places}f}" for value in values), f"a single {number}"


def _extraction(pair: AnswerPair) -> tuple[str, bool]:
    """The answer inside the reply, and whether it was for the judge to find.

    Without a judge's reply, a quoted answer phrase is taken, as in the official quick extraction.
    """
    plain = settled(pair.text, pair.reference)
    if plain is not None:
        return plain, False
    if pair.verdict is not None:
        return pair.verdict, True
    quoted = _QUOTED.search(pair.text)
    return (quoted.group(1), False) if quoted else ("", True)


def _tally(items: Sequence[Item]) -> JsonDict:
    correct = int(sum(item.score for item in items))
    return {"accuracy": correct / len(items), "correct": correct, "total": len(items)}


def _breakdown(pairs: Sequence[AnswerPair], items: Sequence[Item]) -> JsonDict:
    """Accuracy by the kinds of questions; a question with several skills counts for each."""
    report: JsonDict = {}
    for name in _GROUPS:
        groups: dict[str, list[Item]] = {}
        for pair, item in zip(pairs, items, strict=True):
            value = pair.reference.get(name, (pair.reference.get("metadata") or {}).get(name))
            for label in set(value) if isinstance(value, list) else [value]:
                if label is not None:
                    groups.setdefault(str(label), []).append(item)
        if groups:
            report[name] = {label: _tally(groups[label]) for label in sorted(groups)}
    return report


BENCHMARK = MathVista()
