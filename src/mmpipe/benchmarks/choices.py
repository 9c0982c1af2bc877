"""Multiple choice: options in a prompt, and which option a free reply means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
REFUSED = "Z"
"""Stands for a reply that refuses; it is no option and therefore wrong."""

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
_ANSWER_IS = re.compile(
    r"answer\s+is\s+\**([A-D])", re.IGNORECASE
)  # no word end asked: "answer is a cat" is A


def options_block(options: Sequence[str]) -> str:
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
    return _phrase(reply, options) or _only_text(reply, options)


def infer_option_lmms(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter by lmms-eval's copy of that rule (``tasks/mmbench/mmbench_evals.py``, the part without a
    judge).

    A letter from A to E (``E`` stands for "none of them") that is the only one among the words of the reply,
    written bare (not when ``A`` may be an article in more than three words) or with the punctuation of an
    option; otherwise the text of exactly one option, however long the reply is.
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
    contained = [letter for letter, text in options.items() if str(text).lower() in reply.lower()]
    return contained[0] if len(contained) == 1 else None


def _phrase(reply: str, options: Mapping[str, str]) -> str | None:
    found = _ANSWER_IS.search(reply)
    letter = found.group(1).upper() if found else None
    return letter if letter in options else None


def _only_text(reply: str, options: Mapping[str, str]) -> str | None:
    texts = {letter: str(text).lower() for letter, text in options.items()}
    reply = reply.lower()
    if len(reply) > 2 * sum(map(len, texts.values())):
        return None
    contained = [letter for letter, text in texts.items() if text in reply]
    return contained[0] if len(contained) == 1 else None
