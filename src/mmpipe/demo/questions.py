"""Questions about made images, as short answers or multiple choice, in the wording of LLaVA's instruction data."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mmpipe.demo.scenes import ATTRIBUTES
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
        """The question and its options, one a line."""
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return "\n".join([self.question, *lines])

    def rotated(self, by: int) -> Choice:
        """The same question with its options moved ``by`` places towards the front, the first ones to the end."""
        return Choice(self.question, self.options[by:] + self.options[:by], self.answer)


def ask(attribute: str, answer: str, rng: random.Random) -> Choice:
    """Ask about an attribute of a scene with all its values as options, in their usual order from a random one on.

    One fixed circular order leaves as many arrangements as there are options, which a small model learns in a
    minute; free shuffling takes it far longer. CircularEval asks exactly these arrangements.
    """
    values = ATTRIBUTES[attribute]
    start = rng.randrange(len(values))
    return Choice(ASKED_AS[attribute], values[start:] + values[:start], answer)
