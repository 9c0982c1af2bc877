"""The record: the common form of all data formats, from which batches are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mmpipe.errors import DataError

IMAGE_MARK = "<image>"
"""Position of an image in a turn's text; the k-th mark of a record is its k-th image."""

WORDS_PER_IMAGE = 128
"""Length of an image in words, for the length of a record (LLaVA's length grouping)."""

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of a conversation."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation about images."""

    id: str
    source: str
    """The data set the record comes from."""
    images: tuple[str, ...]
    """Paths of the images, in the order of their marks."""
    turns: tuple[Turn, ...]

    @property
    def conversations(self) -> tuple[Record, ...]:
        """The conversations to train on: itself."""
        return (self,)

    def with_questions(self, change: Callable[[str], str]) -> Record:
        """The same with ``change`` applied to what the user says."""
        return replace(self, turns=_with_questions(self.turns, change))


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """A conversation that ends with a question, and two answers to it."""

    id: str
    source: str
    images: tuple[str, ...]
    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str

    @property
    def conversations(self) -> tuple[Record, ...]:
        """The conversation ended by the chosen answer, and ended by the rejected one."""
        return tuple(
            Record(self.id, self.source, self.images, (*self.prompt, Turn("assistant", answer)))
            for answer in (self.chosen, self.rejected)
        )

    def with_questions(self, change: Callable[[str], str]) -> PreferenceRecord:
        """The same with ``change`` applied to what the user says."""
        return replace(self, prompt=_with_questions(self.prompt, change))


def _with_questions(turns: Sequence[Turn], change: Callable[[str], str]) -> tuple[Turn, ...]:
    return tuple(Turn(turn.role, change(turn.text)) if turn.role == "user" else turn for turn in turns)


AnyRecord = Record | PreferenceRecord


class BadRecord(DataError):
    """A record that cannot be trained on. Faults are counted by their kind, ``reason``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def check_unicode(record: AnyRecord) -> None:
    """Raise BadRecord for half of a surrogate pair, as a JSON escape cut in two leaves it: no file can hold it."""
    texts = [*record.images, *(turn.text for conversation in record.conversations for turn in conversation.turns)]
    for text in texts:
        if not is_unicode(text):
            raise BadRecord("text that is not Unicode", f"half of a surrogate pair in {text[:80]!a}")


def is_unicode(text: str) -> bool:
    r"""Whether a text can be encoded.

    >>> is_unicode("\U0001f600"), is_unicode("\ud83d")
    (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_turns(turns: Sequence[Turn]) -> None:
    """Raise BadRecord unless the turns read [system,] user, assistant, user, ..., none of them empty."""
    dialogue = turns[1:] if turns and turns[0].role == "system" else turns
    if not dialogue:
        raise BadRecord("no conversation", "the record has no question and no answer")
    for position, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise BadRecord("unknown role", f"turn {position + 1} is spoken by '{turn.role}'")
    for position, turn in enumerate(dialogue):
        expected = ("user", "assistant")[position % 2]
        if turn.role != expected:
            raise BadRecord(
                "odd turn order", f"turn {position + 1} is spoken by the {turn.role}, expected the {expected}"
            )
    if len(dialogue) % 2:
        raise BadRecord("odd turn order", "the conversation ends with a question that is not answered")
    for position, turn in enumerate(turns):
        if not turn.text.strip():
            what = {"assistant": "answer", "user": "question", "system": "system message"}[turn.role]
            raise BadRecord(f"empty {what}", f"turn {position + 1} of {len(turns)} has no text")


def check_marks(record: Record) -> None:
    """Raise BadRecord unless there is one ``<image>`` mark per image in the user's turns. In others it is text."""
    marks = sum(turn.text.count(IMAGE_MARK) for turn in record.turns if turn.role == "user")
    if marks != len(record.images):
        raise BadRecord("image marks and images differ", f"{marks} {IMAGE_MARK} marks for {len(record.images)} images")


def check_record(record: AnyRecord) -> None:
    """Raise BadRecord unless every conversation of the record can be trained on."""
    for conversation in record.conversations:
        check_turns(conversation.turns)
        check_marks(conversation)
    if isinstance(record, PreferenceRecord) and record.chosen.strip() == record.rejected.strip():
        raise BadRecord("equal answers", "the chosen and the rejected answer are the same, but for space around them")


def length_in_words(record: AnyRecord) -> int:
    """Words of the longest conversation, ``WORDS_PER_IMAGE`` for an image: what batches are grouped by."""
    words = max(sum(len(turn.text.split()) for turn in c.turns) for c in record.conversations)
    return words + WORDS_PER_IMAGE * len(record.images)
