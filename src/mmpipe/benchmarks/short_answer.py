"""Short answers: the text normalisation of the VQA challenges, and accuracy against ten human answers.

The rules are those of the VQA evaluation (GT-Vision-Lab/VQA, ``vqaEval.py``) and of the answer processor of
EvalAI that Pythia/MMF and LLaVA use (``m4c_evaluator.py``). Two oddities are part of the measure and reproduced:
the look-behind of the period rule is misspelt, so that every period without a digit after it goes, and
``re.UNICODE`` stands where a count is expected, so that at most 32 periods go.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from mmpipe.benchmarks.base import SHORT_ANSWER, AnswerPair, Benchmark, Item, Protocol
from mmpipe.benchmarks.jsonl import JsonDict
from mmpipe.errors import DataError

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_DIGIT_COMMAS_DIGIT = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")
LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
"""A period with no digit before or after it."""
_MOST_PERIODS = int(re.UNICODE)

# Contractions are completed from the spelling without one of their apostrophes.
_FULL = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's
there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's
what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've
wouldn't y'all you'd you'll you're you've couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've
shouldn't've somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've
y'all'll you'd've 'ow's'at y'all'd've
"""


CONTRACTIONS = {
    full[:place] + full[place + 1 :]: full
    for full in _FULL.split()
    for place, character in enumerate(full)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def drop_punctuation(
    text: str, digit_comma: re.Pattern[str] = _DIGIT_COMMA_DIGIT, period: re.Pattern[str] = _PERIOD
) -> str:
    """Delete a mark that stands beside a blank anywhere in the text, or any mark of a text with a comma
    between digits; put a blank for the others. Then delete periods that no digit follows."""
    delete_all = digit_comma.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        if mark in text:
            beside_blank = mark + " " in text or " " + mark in text
            out = out.replace(mark, "" if delete_all or beside_blank else " ")
    return period.sub("", out, count=_MOST_PERIODS)


def drop_articles(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """Lower case, number words up to ten as digits, no articles, apostrophes restored."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def one_line(text: str) -> str:
    """Newlines and tabs as blanks, none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=65536)
def vqa_normal(text: str, digit_comma: re.Pattern[str] = _DIGIT_COMMA_DIGIT, period: re.Pattern[str] = _PERIOD) -> str:
    """The normal form of the VQA evaluation for a text that ``one_line`` has cleaned."""
    return drop_articles(drop_punctuation(text, digit_comma, period))


@lru_cache(maxsize=65536)
def evalai_normal(text: str) -> str:
    """The normal form of EvalAI's answer processor.

    >>> evalai_normal("The two dogs.")
    '2 dogs'
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return drop_articles(drop_punctuation(one_line(text), _DIGIT_COMMAS_DIGIT))


def soft_accuracy(answer: str, humans: Sequence[str]) -> float:
    """Mean over the humans of min(1, matches among the others / 3) (Antol et al. 2015, arXiv 1505.00468).

    With ten humans: 0, 0.3, 0.6, 0.9, 1, ... for 0, 1, 2, 3, 4, ... equal answers.
    """
    if not humans:
        return 0.0
    matches = Counter(humans)[answer]
    agreeing = matches * min(1.0, (matches - 1) / 3) if matches else 0.0
    return (agreeing + (len(humans) - matches) * min(1.0, matches / 3)) / len(humans)


def both_sides(normal: Callable[[str], str]) -> AnswerRule:
    """The rule that normalises the reply and every human answer alike."""

    def rule(reply: str, humans: Sequence[str]) -> tuple[str, float]:
        prediction = normal(reply)
        return prediction, soft_accuracy(prediction, [normal(human) for human in humans])

    return rule


def vqa(reply: str, humans: Sequence[str]) -> tuple[str, float]:
    """The VQA evaluation, which normalises only where the humans do not all agree."""
    reply, humans = one_line(reply), [one_line(human) for human in humans]
    return both_sides(vqa_normal)(reply, humans) if len(set(humans)) > 1 else (reply, soft_accuracy(reply, humans))


AnswerRule = Callable[[str, Any], tuple[str, float]]
"""(reply, right answer or answers) -> (the prediction as it is compared, its score from 0 to 1)"""


class ShortAnswer(Benchmark):
    """Questions with short answers: the protocol's rule turns the reply into a prediction and compares it."""

    rules: ClassVar[Mapping[str, AnswerRule]]
    prompts = {"llava": "{question}" + SHORT_ANSWER}

    def gold(self, reference: JsonDict) -> Any:
        """The right answer, or all of them."""
        return str(reference["answer"])

    def facts(self, reference: JsonDict) -> JsonDict:
        """Further fields of the item: ``shown``, by default the right answer."""
        return {name: reference[name] for name in self.shown} or {"gold": self.gold(reference)}

    def variables(self, record: JsonDict) -> JsonDict:
        return {**record, "capitalised": str(record.get("question", "")).capitalize()}

    def item(self, pair: AnswerPair, protocol: Protocol) -> Item:
        prediction, score = self.rules[protocol.rule](pair.text, self.gold(pair.reference))
        return self.result(pair, score, prediction, **self.facts(pair.reference))


class HumanAnswers(ShortAnswer):
    """Short answers compared with those of about ten humans (``answers``); EvalAI accepts normalised ones."""

    submission = "json"
    rules = {
        "evalai": both_sides(evalai_normal),
        "vqa": vqa,
        "vqa_uploaded": lambda reply, humans: vqa(evalai_normal(reply), humans),
        # lmms-eval has EvalAI's comma rule; VLMEvalKit deletes only the periods that stand between no digits
        "lmms": both_sides(lambda text: vqa_normal(one_line(text), _DIGIT_COMMAS_DIGIT)),
        "vlmevalkit": both_sides(lambda text: vqa_normal(one_line(text), period=LONE_PERIOD)),
    }
    humans: ClassVar[int | None] = None
    """Number of answers of each question; any number where this is None."""

    def gold(self, reference: JsonDict) -> list[str]:
        """The human answers. Raises DataError where there are none, or another number than ``humans``."""
        answers = reference.get("answers") or []
        if not answers or self.humans not in (None, len(answers)):
            raise DataError(
                f"{self.name}: question {self.id_of(reference)} has {len(answers)} human answers, not "
                f"{self.humans or 'one or more'}; a test split is scored by EvalAI only: write its submission file "
                "with 'convert'"
            )
        return [str(answer["answer"] if isinstance(answer, dict) else answer) for answer in answers]

    def submitted(self, pair: AnswerPair) -> JsonDict:
        """An entry of EvalAI's list; a question without answer has the empty one."""
        return {"question_id": pair.reference["question_id"], "answer": evalai_normal(pair.text)}
