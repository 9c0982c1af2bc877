"""Tokens into text as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are no character yet."""


class Detokenizer:
    """Gives the text that each token adds; the pieces joined are the decoded whole.

    A token alone has no text: blanks depend on the token before, and characters can take several tokens. So the new token is
    decoded together with the last few, and held back until its characters are whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self._start = 0
        self._shown = 0

    def feed(self, token: int) -> str:
        """The text that can be shown now; often a word, sometimes nothing."""
        self.ids.append(token)
        new = self._new()
        if not new or new.endswith(_UNFINISHED):
            return ""
        self._start, self._shown = self._shown, len(self.ids)
        return new

    def rest(self) -> str:
        """What was still held back at the end."""
        return self._new()

    def _new(self) -> str:
        before = self._decode(self.ids[self._start : self._shown])
        return self._decode(self.ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


class TextStream:
    """Pieces of an answer on their way out: without blanks at its beginning, cut before a stop text."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.text = ""
        self.ended = False
        """Whether a stop text was met."""

    def feed(self, piece: str) -> str:
        """What of the text so far can be shown: nothing that may be the beginning of a stop text."""
        if self.ended:
            return ""
        held = self._held + piece
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self.ended = True
            return self._out(held[: min(places)], "")
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        return self._out(held[: len(held) - keep], held[len(held) - keep :])

    def rest(self) -> str:
        """What was held back, at the end."""
        return "" if self.ended else self._out(self._held, "")

    def _out(self, text: str, held: str) -> str:
        self._held = held
        shown = text if self.text else text.lstrip()
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
