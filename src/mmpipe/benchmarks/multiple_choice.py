"""Multiple choice: options in a prompt, and option extraction from free replies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

from mmpipe.benchmarks.base import OPTION_LETTER, AnswerPair, Benchmark, Item, Protocol
from mmpipe.benchmarks.jsonl import JsonDict

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
REFUSED = "Z"
"""The letter of a refusal; it is not an option and therefore wrong."""

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_API_FAILURE = "Failed to obtain answer via API"
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_OPTION_MARKS = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
_FORM_RANKS = ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} "))
_PHRASE_RANK, _END_RANK, _START_RANK = 7, 9, 10
_ANSWER_PHRASES = (
    "the answer is", "answer is",
    *(f"{the}{which} {noun} is" for which in ("correct", "best") for noun in ("answer", "option") for the in ("the ", "")),
    "the choice is", "choice is", "the correct choice is", "correct choice is",
    "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)  # no word end asked: "answer is a cat" is A


def options_block(options: Iterable[str]) -> str:
    """``A. first`` and so on, one line an option."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def infer_option(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that a reply means, ``Z`` for a refusal, None where nothing can be inferred.

    The rule of VLMEvalKit's ``can_infer`` (open-compass/VLMEvalKit, ``vlmeval/utils/matching_util.py``),
    without a judge. In order: refusal phrases; one single option letter as a word, among the last four words;
    a ``Z`` alone; an "answer is X" phrase (A to D, in either case); the text of exactly one option inside a
    reply that is not longer than twice all options together. Letters are case-sensitive, texts are not.

    >>> infer_option("(B) rabbit", {"A": "bear", "B": "rabbit"})
    'B'
    """
    if _API_FAILURE in reply:
        return None
    if any(phrase in reply for phrase in _REFUSALS):
        return REFUSED
    words = reply.translate(_SEPARATORS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and REFUSED in words:
        return REFUSED
    found = _ANSWER_IS.search(reply)
    if found and found.group(1).upper() in options:
        return found.group(1).upper()
    if len(reply.lower()) > 2 * sum(len(str(text).lower()) for text in options.values()):
        return None
    return _only_text(reply, options)


def infer_option_lmms(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter by lmms-eval's copy of that rule (``tasks/mmbench/mmbench_evals.py``, the part without a judge).

    A letter from A to E (``E`` stands for "none of them") that is the only one among the words of the reply, written
    bare (not when ``A`` may be an article in more than three words) or with the punctuation of an option; otherwise the
    text of exactly one option, however long the reply is.
    """
    if _API_FAILURE in reply:
        return None
    words = reply.split()
    if not ("A" in words and len(words) > 3):
        bare = [letter for letter in "ABCDE" if letter in words]
        if len(bare) == 1:
            return bare[0]
    for before, after in _OPTION_MARKS:
        marked = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
        if len(marked) == 1:
            return marked[0]
    return _only_text(reply, options)


def _only_text(reply: str, options: Mapping[str, str]) -> str | None:
    """The option whose text the reply contains, if it is one alone."""
    contained = [letter for letter, text in options.items() if str(text).lower() in reply.lower()]
    return contained[0] if len(contained) == 1 else None


def extract_letter_lmms(reply: str, letters: str) -> str | None:
    """The letter that lmms-eval's general extractor finds (``tasks/_task_utils/mcq_extract.py``), None if there is
    none.

    Forms have a rank: at the beginning, at the end, after an answer phrase, ``(A)``, ``A.``, ``A:``, ``A)``, followed
    by a blank. The highest rank wins, in it the last place, in one place the first letter of the alphabet.
    """
    if not reply.strip():
        return None
    text = reply.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text = f" {text} "
    found = [
        (rank, text.rfind(form.format(letter)), letter)
        for rank, form in _FORM_RANKS
        for letter in letters
        if form.format(letter) in text
    ]
    for phrase in _ANSWER_PHRASES:  # the first place of every letter after the first place of the phrase
        start = text.lower().find(phrase)
        places = [(text.find(letter, start + len(phrase)), letter) for letter in letters if start >= 0]
        found += [(_PHRASE_RANK, place, letter) for place, letter in places if place >= 0]
    bare = text.strip()
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((_START_RANK, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((_END_RANK, len(text) - 1, letter))
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda entry: entry[:2])[2] if found else None


LetterRule = Callable[[str, Mapping[str, str]], str | None]
"""(reply, options by letter) -> the letter that the reply means, None where it names none"""


class MultipleChoice(Benchmark):
    """Questions with lettered options: the protocol's rule reads a letter from the reply, right or wrong."""

    rules: ClassVar[Mapping[str, LetterRule]]
    prompts = {"llava": "{question}\n{options}" + OPTION_LETTER}

    def options(self, reference: JsonDict) -> dict[str, str]:
        """The options' texts by letter."""
        return dict(zip(LETTERS, reference["options"], strict=False))

    def gold(self, reference: JsonDict) -> str:
        """The right letter."""
        return str(reference["answer"])

    def variables(self, record: JsonDict) -> JsonDict:
        return {**record, "options": options_block(self.options(record).values())}

    def facts(self, pair: AnswerPair, letter: str | None) -> JsonDict:
        """Further fields of the item."""
        return {"gold": self.gold(pair.reference)}

    def item(self, pair: AnswerPair, protocol: Protocol) -> Item:
        letter = self.rules[protocol.rule](pair.text, self.options(pair.reference)) if pair.answered else None
        return self.result(pair, letter == self.gold(pair.reference), letter, **self.facts(pair, letter))
