"""Questions about made pictures, as short answers or multiple choice, in the wording of LLaVA's instruction data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mmpipe.errors import DataError

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""Ends every question that wants a word (LLaVA-1.5, section 3.2 and table 7)."""

LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
"""Ends every multiple-choice question (LLaVA-1.5, table 7)."""

LETTERS = "ABCD"

ASKED_AS = {
    "shape": "What shape is drawn?",
    "color": "What color is drawn?",
    "count": "How many shapes are drawn?",
    "side": "On which side is it drawn?",
    "size": "What size is drawn?",
    "background": "What color is the background?",
}
"""The question about each attribute of a scene."""


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question: ``options`` in the order of their letters, and the text of the right one."""

    question: str
    options: tuple[str, ...]
    answer: str

    def __post_init__(self) -> None:
        if self.answer not in self.options or not 2 <= len(self.options) <= len(LETTERS):
            raise DataError(
                f"{self.question!r}: {self.answer!r} must be one of two to four options, not {self.options}"
            )

    @property
    def letter(self) -> str:
        """The letter of the right option."""
        return LETTERS[self.options.index(self.answer)]

    @property
    def text(self) -> str:
        """The question as a person asks it: one option a line, then what form of answer is wanted."""
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return "\n".join([self.question, *lines, LETTER_ANSWER])

    def rotated(self, by: int) -> Choice:
        """The same question with its options moved ``by`` places towards the front, the first ones to the end."""
        return Choice(self.question, self.options[by:] + self.options[:by], self.answer)


def make_choice(question: str, answer: str, others: Sequence[str], size: int, rng: random.Random) -> Choice:
    """Offer ``answer`` among ``size - 1`` of ``others``, in random order."""
    options = [answer, *rng.sample([other for other in others if other != answer], size - 1)]
    rng.shuffle(options)
    return Choice(question, tuple(options), answer)
